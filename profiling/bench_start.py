"""How much host memory the start of a large model takes on each rank, and how long: from a weights file to an engine.

    python profiling/bench_start.py [--size large] [--processes 4] [--out profiling/results/start]

Every rank of a torchrun job on this machine builds the same configuration of SNELL-8 on timm's ViT from a safetensors
file, which is written first. Under `ddp` each rank reads the whole model, as everywhere where nothing is sharded; under
`fsdp` and `zero 3` one rank of the node reads it and the others get their shards a block at a time.

peak     of the process's memory while it builds, looked at every few milliseconds, less what it had before: then a tiny
         model has been built the same way, and all libraries are loaded
held     what of it stays when the engine is ready

Memory is resident and anonymous: not the pages of the weights file, which are mapped and can be dropped at any moment.
On a CPU a rank's shards are host memory, too; on GPUs they are not. Writes OUT.json, OUT.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import timm
import torch
from demo import environment, where_run
from safetensors.torch import save_file

from snell_dist import dist, meeting
from snell_dist.build import Built, build
from snell_dist.config import load
from snell_dist.memory.measure import held_bytes
from snell_dist.run_config import Run

ENGINES = {
    "ddp": ["engine.name=ddp"],
    "fsdp": ["engine.name=fsdp"],
    "zero 3": ["engine.name=zero", "engine.stage=3"],
}
MODELS = {size: f"vit_{size}_patch16_224" for size in ("base", "large")} | {"huge": "vit_huge_patch14_224"}
PIXELS = {"base": 32, "large": 32, "huge": 28}  # two patches a side: the digits, which every rank reads, stay small
MIB = 2**20
LOOK_S = 0.003


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=MODELS, default="large")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--out", type=Path, default=Path("profiling/results/start"))
    parser.add_argument("--rank-of", nargs=2, metavar=("ENGINE", "WEIGHTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        one_rank(args.size, *args.rank_of)
    report: dict[str, Any] = {"environment": environment(), "processes": args.processes, "engines": {}}
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.safetensors"
        model = timm.create_model(MODELS[args.size], in_chans=1, img_size=PIXELS[args.size])
        save_file(model.state_dict(), weights)
        report["model"] = {"name": MODELS[args.size], "bytes": weights.stat().st_size}
        del model
        for name in args.only:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
            command = [sys.executable, "-m", *launcher, __file__, "--size", args.size, "--rank-of", name, str(weights)]
            quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            done = subprocess.run(command, env=os.environ | quiet, stdout=subprocess.PIPE, text=True, check=True)
            report["engines"][name] = json.loads(done.stdout.splitlines()[-1])
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return 0


def one_rank(size: str, engine: str, weights: str) -> None:
    """Builds, measures, and says on rank 0 what all ranks saw."""
    tiny = ["backbone.weights=null", "backbone.width=16", "backbone.depth=1", "backbone.heads=2"]
    own = [f"backbone.{key}=null" for key in ("depth", "width", "heads", "patch_size")]
    own += [f"{section}.image_size={PIXELS[size]}" for section in ("backbone", "data")]
    own += [f"backbone.size={size}", f"backbone.weights={weights}"]
    device = torch.device("cpu")
    with meeting.process_group(device):
        built_by(engine, tiny, device)
        torch.distributed.barrier()
        gc.collect()
        before, begin = anonymous_bytes(), time.perf_counter()
        with Peak() as peak:
            built = built_by(engine, own, device)
        seconds = time.perf_counter() - begin
        gc.collect()
        mine = {
            "peak_bytes": peak.bytes - before,
            "held_bytes": anonymous_bytes() - before,
            "engine_bytes": held_bytes(built.engine),
            "seconds": seconds,
        }
        found = dist.gather_objects(mine)
        if dist.rank() == 0:
            print(json.dumps(found))
    dist.leave(0)


def built_by(engine: str, settings: list[str], device: torch.device) -> Built:
    overrides = [*settings, "data.batch_size=16", "train.device=cpu", *ENGINES[engine]]
    config = load("demo", overrides, Run).config
    return build(config, config.backbone.weights, device)


def anonymous_bytes() -> int:
    """Of this process, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


class Peak:
    """The largest `anonymous_bytes` within the block, as a thread sees it."""

    def __init__(self) -> None:
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(LOOK_S):
            self.bytes = max(self.bytes, anonymous_bytes())


def markdown(report: dict[str, Any]) -> str:
    model, ranks = report["model"], report["processes"]
    lines = [
        f"{model['name']}, {model['bytes'] / MIB:,.0f} MiB in its file, SNELL-8, {ranks} ranks on one machine.",
        "",
        "| engine | rank 0: peak | held | other ranks: peak | held | tensors of the engine | **sum of peaks** | time |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, found in report["engines"].items():
        first, others = found[0], found[1:]
        cells = [f"{first[key] / MIB:,.0f}" for key in ("peak_bytes", "held_bytes")]
        cells += [f"{max(r[key] for r in others) / MIB:,.0f}" for key in ("peak_bytes", "held_bytes", "engine_bytes")]
        total = sum(r["peak_bytes"] for r in found) / MIB
        seconds = max(r["seconds"] for r in found)
        lines.append(f"| {name} | {' | '.join(cells)} | **{total:,.0f} MiB** | {seconds:.1f} s |")
    return "\n".join([*lines, "", f"MiB; of other ranks the most. {where_run(report['environment'])}", ""])


if __name__ == "__main__":
    sys.exit(main())
