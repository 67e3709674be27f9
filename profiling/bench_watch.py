"""What watching costs: the heartbeat as a share of a training step, and the pre-flight of two ranks.

    python profiling/bench_watch.py [--steps 400] [--rounds 10] [--out profiling/results/watch]

Heartbeat: the same training with and without it, in turns of 20 steps, for the ratio that a user would see; and, since
that is noise where the cost is small, the calls of a step times what a call takes, and a write of the file a second.
Pre-flight: the seconds that rank 0 says in its log, over several starts by torchrun.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path
from typing import Any

import torch
from demo import environment, where_run

from snell_dist import dist, heartbeat
from snell_dist.build import build
from snell_dist.config import load
from snell_dist.observers import Moment, StepTimer
from snell_dist.run_config import Run
from snell_dist.selection import Selection
from snell_dist.train import loop

TURN = 20  # steps
QUIET = ["backbone.weights=null", "train.eval_every=null", "train.save_every=1000000", "train.device=cpu"]
QUIET += ["train.log_every=1000000"]
PREFLIGHT = re.compile(r"preflight: .*\((\d+\.\d+) s\); .* in (\d+\.\d+) ms")


class Turns:
    """Observer: has every other turn of steps without a heart, and times each step."""

    def __init__(self, heart: heartbeat.Heart) -> None:
        self._heart, self._begin = heart, time.perf_counter()
        self.seconds: dict[bool, list[float]] = {True: [], False: []}

    def on_step(self, moment: Moment) -> None:
        now = time.perf_counter()
        if moment.step >= TURN:  # the first turn warms up
            self.seconds[moment.step // TURN % 2 == 0].append(now - self._begin)
        heartbeat._heart = self._heart if (moment.step + 1) // TURN % 2 == 0 else None
        self._begin = time.perf_counter()

    def on_end(self, summary: dict[str, Any]) -> None:
        pass


class Counting(heartbeat.Heart):
    calls = 0

    def enter(self, phase: str, step: int | None = None) -> None:
        self.calls += 1
        super().enter(phase, step)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=10, help="starts of two ranks")
    parser.add_argument("--out", type=Path, default=Path("profiling/results/watch"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        report = {
            "environment": environment(),
            "heartbeat": beats(args.steps, Path(folder)),
            "preflight": preflights(args.rounds, Path(folder)),
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return 0


def beats(steps: int, folder: Path) -> dict[str, float]:
    config = load("demo", [*QUIET, f"train.steps={steps}"], Run).config
    built = build(config, None, torch.device("cpu"))
    heart = Counting(folder, 1, steps, 1e9, lambda place, stuck_s: None)
    turns, stop = Turns(heart), dist.StopRequest()
    loop(config, folder, built, 0, Selection(config, folder, built), [turns], StepTimer(built.engine.device), stop)
    heartbeat._heart = None
    with_it, without = (statistics.median(turns.seconds[on]) for on in (True, False))
    calls = heart.calls / (steps / 2)
    call_s = timeit.timeit(lambda: heart.enter("data"), number=100_000) / 100_000
    write_s = timeit.timeit(heart._write, number=1000) / 1000
    heart.stop("well")
    counted = (calls * call_s) / without + write_s / heartbeat.PERIOD_S
    return {
        "step_s": without, "ratio": with_it / without, "calls": calls, "call_s": call_s, "write_s": write_s,
        "counted": counted,
    }  # fmt: skip


def preflights(rounds: int, folder: Path) -> dict[str, float]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    tiny = ["backbone.width=16", "backbone.depth=2", "backbone.heads=2", "data.batch_size=12", "train.steps=1"]
    meet, reduce = [], []
    for i in range(rounds):
        command = [*launcher, "snell_dist", "train", "demo", *QUIET, *tiny, "--out", str(folder / str(i))]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        found = PREFLIGHT.search(done.stderr)
        assert found, done.stderr
        meet.append(float(found[1]))
        reduce.append(float(found[2]))
    return {"median_s": statistics.median(meet), "most_s": max(meet), "all_reduce_ms": statistics.median(reduce)}


def markdown(report: dict[str, Any]) -> str:
    beat, flight = report["heartbeat"], report["preflight"]
    lines = [
        "| what | figure |",
        "| --- | ---: |",
        f"| a step without a heartbeat | {1e3 * beat['step_s']:.2f} ms |",
        f"| with it, over without, measured in turns | {beat['ratio']:.4f} |",
        f"| calls a step, of {1e6 * beat['call_s']:.2f} us | {beat['calls']:.1f} |",
        f"| a write, one a second | {1e6 * beat['write_s']:.0f} us |",
        f"| **counted cost, of a step** | **{100 * beat['counted']:.3f} %** |",
        f"| **pre-flight of two ranks, median and most** | **{flight['median_s']:.2f} s, {flight['most_s']:.2f} s** |",
        f"| its all-reduce of 1 MiB | {flight['all_reduce_ms']:.1f} ms |",
    ]
    return "\n".join([*lines, "", where_run(report["environment"]), ""])


if __name__ == "__main__":
    sys.exit(main())
