"""What a step costs a user of Hugging Face PEFT with our layers, beside our own harness's step, in one run.

    python profiling/bench_peft.py [--rounds 12] [--threads N] [--out profiling/results/peft]

timm's ViT-B/16 with random weights, 224 x 224, batches of 4, SNELL-8 on every linear layer but the classifier, AdamW
and clipping, float32.

harness   the package's own training loop, whole: seeds, feed, task, engine, the question whether to stop, observers
peft      get_peft_model(model, SnellConfig(...)) around the same model, and a loop of plain torch, on batches that are
          there already

They take turns: a step by PEFT follows each step of the harness. Three turns warm up; the others are timed. Times are
medians; ratios are those of each turn, their median, least and most. Writes OUT.json, OUT.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_engines import COUNTED, Step, Turns, torch_by_hand
from demo import environment, where_run
from peft import get_peft_model

from snell_dist import dist
from snell_dist.build import build
from snell_dist.config import load
from snell_dist.feed import Feed
from snell_dist.observers import StepTimer
from snell_dist.peft import SnellConfig
from snell_dist.run_config import Run
from snell_dist.selection import Selection
from snell_dist.train import loop

SETTINGS = [
    *(
        "backbone.weights=null",
        "backbone.size=base",
        "backbone.width=null",
        "backbone.depth=null",
        "backbone.heads=null",
    ),
    *("backbone.image_size=224", "backbone.patch_size=16", "data.image_size=224", "data.batch_size=4"),
    *("method.rank=8", "method.also_train=[head]"),
    *("optim.lr=1e-3", "optim.schedule=constant", "optim.warmup_steps=0", "optim.clip_norm=1.0"),
    *("train.device=cpu", "train.eval_every=null", "train.save_every=1000000", "train.steps=1000000"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--set", nargs="+", metavar="key=value", default=[], help="other settings than those above")
    parser.add_argument("--out", type=Path, default=Path("profiling/results/peft"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        report = {"environment": environment(), "rounds": args.rounds, "threads": args.threads, "settings": args.set}
        report |= measure(args.set, args.rounds, Path(folder))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return 0


def measure(settings: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    config = load("demo", [*SETTINGS, *settings], Run).config
    built = build(config, None, torch.device("cpu"))
    feed = Feed(built.splits.train, config.data, config.train.seed, 0, COUNTED + 1 + rounds)
    stop = dist.StopRequest()
    turns = Turns(by_peft(config), feed, rounds, stop)
    loop(config, folder, built, 0, Selection(config, folder, built), [turns], StepTimer(built.engine.device), stop)
    figures = turns.figures()
    harness, peft = figures["seconds"].values()
    ratio = figures["ratio"]  # of the harness over PEFT; said the other way round
    return {
        "batch_size": config.data.batch_size,
        "seconds": {"harness": harness, "peft": peft},
        "ratio": {"median": 1 / ratio["median"], "least": 1 / ratio["most"], "most": 1 / ratio["least"]},
        "losses": figures["losses"],
    }


def by_peft(config: Run) -> Step:
    dist.seed_everything(config.train.seed)
    backbone = config.task.build(config.backbone, config.data.load(config.protocol.all_labelled).classes)
    method: Any = config.method
    model = get_peft_model(
        backbone.model,
        SnellConfig(
            rank=method.rank, sparsity=method.sparsity, target_modules=[target.layer for target in backbone.targets],
            modules_to_save=["head"],
        ),
    )  # fmt: skip
    return torch_by_hand(config, model.train(), lambda last: None)


def markdown(report: dict[str, Any]) -> str:
    seconds, ratio = report["seconds"], report["ratio"]
    spread = f"{ratio['least']:.2f} to {ratio['most']:.2f}"
    times = " | ".join(f"{1000 * each:.0f} ms" for each in seconds.values())
    about = (
        f"ViT-B/16, SNELL-8, batches of {report['batch_size']}, {report['threads']} threads, {report['rounds']} rounds"
    )
    other = f" ({' '.join(report['settings'])})" if report["settings"] else ""
    lines = [
        "| harness | PEFT | **PEFT / harness** | least to most |",
        "| ---: | ---: | ---: | ---: |",
        f"| {times} | **{ratio['median']:.3f}** | {spread} |",
        "",
        f"{about}{other}. {where_run(report['environment'])}",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
