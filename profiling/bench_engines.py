"""What our engines and loop cost a step beside the same done by hand in plain torch or DeepSpeed, in one run.

    python profiling/bench_engines.py [--rounds 20] [--only fsdp "zero 3"] [--out profiling/results/engines]

Two processes on gloo, one thread each, train a ViT of 6 blocks of width 192 on 197 tokens by SNELL-8, in two
micro-batches a step, with AdamW and clipping.

ours      the package's own training loop, whole: seeds, feed, task, engine, the question whether to stop, observers
by hand   DistributedDataParallel, fully_shard or deepspeed.initialize around the same adapted model, with the same
          optimizer, on batches that are there already

They take turns: a step by hand follows each step of ours. Two turns warm up; in the third the bytes are counted that
are given to collectives (of a gather or scatter the whole tensor, on one rank); the others are timed on rank 0, all
ranks starting together. Times are medians; ratios are those of each turn, their median, least and most.
Writes OUT.json, OUT.md after each engine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from demo import environment, where_run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snell_dist import dist, meeting, methods, optim
from snell_dist.build import build
from snell_dist.config import load
from snell_dist.data import Batch
from snell_dist.feed import Feed
from snell_dist.observers import Moment, StepTimer
from snell_dist.run_config import Run
from snell_dist.selection import Selection
from snell_dist.train import loop

RANKS = 2
COUNTED = 2  # the step in which bytes are counted; those after it are timed
SETTINGS = [
    *("backbone.weights=null", "backbone.width=192", "backbone.depth=6", "backbone.heads=3"),
    *("backbone.image_size=56", "backbone.patch_size=4", "data.image_size=56"),
    *("data.batch_size=4", "data.micro_batch_size=1"),
    *("optim.lr=1e-3", "optim.schedule=constant", "optim.warmup_steps=0", "optim.clip_norm=1.0"),
    *("train.device=cpu", "train.eval_every=null", "train.save_every=1000000", "train.steps=1000000"),
]
Step = Callable[[list[Batch]], Tensor]  # the micro-batches of a step to this rank's mean loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--set", nargs="+", metavar="key=value", default=[], help="other settings than those above")
    parser.add_argument("--out", type=Path, default=Path("profiling/results/engines"))
    args = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        return subprocess.run([*launcher, *sys.argv], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode
    report: dict[str, Any] = {"environment": environment(), "rounds": args.rounds, "engines": []}
    with meeting.process_group(torch.device("cpu")), tempfile.TemporaryDirectory() as folder:
        for name in args.only:
            place = Path(folder) / name
            place.mkdir()
            report["engines"].append(measure(name, args.set, args.rounds, place))
            gc.collect()  # the model and its rival
            if dist.rank() == 0:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
                args.out.with_suffix(".md").write_text(markdown(report))
                print(markdown(report))
    dist.leave(0)


def measure(name: str, settings: list[str], rounds: int, folder: Path) -> dict[str, Any]:
    """Ours and by hand, in turns. All ranks call it; the figures are those of the calling rank."""
    engine, by_hand = CASES[name]
    config = load("demo", [*SETTINGS, *engine, *settings], Run).config
    built = build(config, None, torch.device("cpu"))
    feed = Feed(built.splits.train, config.data, config.train.seed, 0, COUNTED + 1 + rounds)
    stop = dist.StopRequest()
    turns = Turns(by_hand(config), feed, rounds, stop)
    loop(config, folder, built, 0, Selection(config, folder, built), [turns], StepTimer(built.engine.device), stop)
    return {"engine": name, **turns.figures()}


class Turns:
    """Observer: after each step of the loop, the same step by hand. Asks the loop to stop after so many rounds."""

    def __init__(self, by_hand: Step, feed: Feed, rounds: int, stop: dist.StopRequest) -> None:
        self._by_hand, self._last, self._stop = by_hand, COUNTED + rounds, stop
        self._batches = [list(feed.step()) for _ in range(self._last + 1)]
        self._seconds: dict[str, list[float]] = {"ours": [], "by hand": []}
        self._losses: list[tuple[float, float]] = []
        self._wire = {"ours": Collectives(), "by hand": Collectives()}
        self._begin = 0.0

    def on_step(self, moment: Moment) -> None:
        self._after("ours", moment.step)
        self._before("by hand", moment.step)
        loss = self._by_hand(self._batches[moment.step])
        self._after("by hand", moment.step)
        if "loss" in moment.metrics:
            mean = dist.sum_over_ranks(loss.clone()).item() / dist.world_size()
            self._losses.append((moment.metrics["loss"], mean))
        if moment.step == self._last - 1:  # the loop looks in its next step
            self._stop.received = signal.SIGTERM
        if moment.step < self._last:
            self._before("ours", moment.step + 1)

    def on_end(self, summary: dict[str, Any]) -> None:
        pass

    def _before(self, whose: str, step: int) -> None:
        dist.barrier()
        if step == COUNTED:
            self._wire[whose].__enter__()
        self._begin = time.perf_counter()

    def _after(self, whose: str, step: int) -> None:
        if step > COUNTED:
            self._seconds[whose].append(time.perf_counter() - self._begin)
        if step == COUNTED:
            self._wire[whose].__exit__(None, None, None)

    def figures(self) -> dict[str, Any]:
        ratios = [ours / theirs for ours, theirs in zip(*self._seconds.values(), strict=True)]
        return {
            "seconds": {whose: statistics.median(seconds) for whose, seconds in self._seconds.items()},
            "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
            "calls": {whose: wire.calls for whose, wire in self._wire.items()},
            "bytes": {whose: wire.bytes for whose, wire in self._wire.items()},
            "losses": self._losses,
        }


class Collectives(TorchDispatchMode):
    """Calls and bytes of each kind of collective within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::").strip("_")
            largest = max((t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), default=0)
            self.calls[name] = self.calls.get(name, 0) + 1
            self.bytes[name] = self.bytes.get(name, 0) + largest
        return function(*args, **(kwargs or {}))


def adapted(config: Run) -> nn.Module:
    """The model that `build` gives to the engine."""
    dist.seed_everything(config.train.seed)
    backbone = config.task.build(config.backbone, config.data.load(config.protocol.all_labelled).classes)
    config.method.inject(backbone)
    methods.freeze_all_but(backbone.model, config.method.trainable(backbone))
    return backbone.model.train()


def ddp_by_hand(config: Run) -> Step:
    model = nn.parallel.DistributedDataParallel(adapted(config))

    def reduce(last: bool) -> None:
        model.require_backward_grad_sync = last

    return torch_by_hand(config, model, reduce)


def fsdp_by_hand(config: Run) -> Step:
    from torch.distributed.fsdp import fully_shard

    model: Any = adapted(config)
    replicates = config.engine.frozen == "replicate"  # type: ignore[attr-defined]
    ignored = {p for p in model.parameters() if not p.requires_grad} if replicates else set()
    for part in (*model.blocks, model):
        fully_shard(part, ignored_params=ignored)
    return torch_by_hand(config, model, model.set_requires_gradient_sync)


def torch_by_hand(config: Run, model: nn.Module, reduce: Callable[[bool], None]) -> Step:
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.make_optimizer(config.optim, model.named_parameters())

    def step(batches: list[Batch]) -> Tensor:
        total = torch.zeros(())
        for batch in batches:
            reduce(batch.last)
            loss = F.cross_entropy(model(batch.images), batch.labels) / len(batches)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(trains, config.optim.clip_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def zero_by_hand(config: Run) -> Step:
    import deepspeed

    model = adapted(config)
    settings = {
        "train_micro_batch_size_per_gpu": config.data.batch_size // RANKS // config.data.accumulation(),
        "gradient_accumulation_steps": config.data.accumulation(),
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {"stage": config.engine.stage},  # type: ignore[attr-defined]
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = optim.make_optimizer(config.optim, model.named_parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(batches: list[Batch]) -> Tensor:
        total = torch.zeros(())
        for batch in batches:
            loss = F.cross_entropy(engine(batch.images), batch.labels)
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(batches)
        return total

    return step


CASES: dict[str, tuple[list[str], Callable[[Run], Step]]] = {
    "ddp": (["engine.name=ddp"], ddp_by_hand),
    "fsdp shard": (["engine.name=fsdp"], fsdp_by_hand),
    "fsdp replicate": (["engine.name=fsdp", "engine.frozen=replicate"], fsdp_by_hand),
    **{f"zero {n}": (["engine.name=zero", f"engine.stage={n}"], zero_by_hand) for n in range(4)},
}


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "| engine | ours | by hand | **ratio** | least to most | collectives and MiB a step: ours | by hand |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in report["engines"]:
        times = [f"{1000 * seconds:.0f} ms" for seconds in found["seconds"].values()]
        ratio = found["ratio"]
        compared = [f"**{ratio['median']:.3f}**", f"{ratio['least']:.2f} to {ratio['most']:.2f}"]
        wire = [
            f"{sum(found['calls'][whose].values())}, {sum(found['bytes'][whose].values()) / 2**20:.2f} MiB"
            for whose in found["seconds"]
        ]
        lines.append(f"| {' | '.join([found['engine'], *times, *compared, *wire])} |")
    return "\n".join([*lines, "", f"{report['rounds']} rounds. {where_run(report['environment'])}", ""])


if __name__ == "__main__":
    sys.exit(main())
