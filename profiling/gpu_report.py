"""On a CUDA machine: real steps beside their predictions, what only a GPU shows, times; all in 8.5 minutes.

    python profiling/gpu_report.py [--rehearse] [--only WORDS ...] [--out profiling/results/gpu]

memory     a real training step beside its prediction: by the ledger, by the allocator, by the driver; errors by
           category and block
steps      whole steps of the methods, as ratios to a rival of the same run
operator   the same of one layer's forward and backward
snapshot   one step's allocations, for https://pytorch.org/memory_viz

Each case is a process of its own with a time limit: one that fails, or finds too little memory, costs one row, which
says so. While one has the GPU the next make themselves ready. OUT.json and OUT.md are written after each case; the page
OUT.html, with OUT.csv and OUT.png, in the end. When the time is over the cases that are left are named and left out.

Without a GPU the same runs as a rehearsal: small models on the CPU, into OUT_rehearsal.*, plainly marked.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gpu_tables
import torch
from bench_operator import SHAPES
from demo import environment
from gpu_case import PEFT, SMALL
from gpu_tables import Case, Outcome

from snell_dist.config import UserError
from snell_dist.files import write_atomic
from snell_dist.memory.standin import AMPERE
from snell_dist.report.memory import write

CASE = Path(__file__).with_name("gpu_case.py")
BUDGET_S, LIMIT_S = 510.0, 75.0  # in all; of one case, before it has the device and again with it
LEAST_S = 5.0  # that must be left, to begin another case
MOST_WORDS = 240  # letters of what a failed case says at last
PAGE_S = 30.0  # kept for the page
BATCH, ROUNDS = 8, 5
METHODS = ["SNELL-8", "LoRA-8", PEFT, "sparse", "full", "linear"]
MORE = ["SNELL-16", "SNELL-32"]
VITS = ["ViT-B/16", "ViT-L/16", "ViT-H/14"]
TOWERS = ["CLIP L/14", "CLIP H/14", "CLIP bigG/14"]
LAYERS = [{"in_features": one, "out_features": two, "rank": 8} for one, two in SHAPES]
FLOAT, HALF = "float32", "bfloat16"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with small models; so without a GPU anyway"
    )
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="cases whose name has any of these in it")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds in all")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of one case")
    parser.add_argument("--out", type=Path, default=None, help="profiling/results/gpu, or gpu_rehearsal")
    args = parser.parse_args()
    begin = time.monotonic()
    rehearsal = args.rehearse or not torch.cuda.is_available()
    out: Path = args.out or Path("profiling/results") / ("gpu_rehearsal" if rehearsal else "gpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    if rehearsal:
        print(f"\n*** {gpu_tables.MARK} ***\n(small models; {why(args.rehearse)})\n", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is an end by hand
    runner = Runner("cpu" if rehearsal else "cuda", args.limit, begin + args.budget - min(PAGE_S, args.budget / 10))
    machine = runner(Case("the machine", "machine"))
    about = machine.found or environment() | {"device": runner.device, "capability": AMPERE}
    about["command"] = f"python {' '.join(sys.argv)}"  # not the case's own
    runner.knows(about)
    planned = rehearsed(out) if rehearsal else cases(out)
    chosen = [case for case in planned if args.only is None or any(words in case.name for words in args.only)]
    places = {case.name: place for place, case in enumerate([machine.case, *chosen])}
    outcomes = [machine]
    try:
        for outcome in runner.all(chosen):
            outcomes = sorted([*outcomes, outcome], key=lambda each: places[each.case.name])
            print(f"[{len(outcomes):3} of {len(chosen) + 1}] {told(outcome)}", file=sys.stderr)
            report = gpu_tables.as_json(rehearsal, about, args.budget, outcomes, time.monotonic() - begin)
            write_atomic(out.with_suffix(".json"), json.dumps(report) + "\n")
            write_atomic(out.with_suffix(".md"), gpu_tables.markdown(report))
    except KeyboardInterrupt:
        print("stopped; what was measured is kept", file=sys.stderr)
    return finish(out, rehearsal, about, args.budget, outcomes, begin)


def finish(
    out: Path, rehearsal: bool, about: dict[str, Any], budget: float, outcomes: Sequence[Outcome], begin: float
) -> int:
    """Writes the page, and the text for the last time. 2 where there is nothing to show, or no library to show it."""
    report = gpu_tables.as_json(rehearsal, about, budget, outcomes, time.monotonic() - begin)
    status = 0
    try:
        if (page := gpu_tables.page(report, outcomes)) is None:
            raise UserError("no step was measured, so there is no page")
        write(page, out)
    except UserError as error:
        print(error, file=sys.stderr)
        status = 2
    report["seconds"] = time.monotonic() - begin
    write_atomic(out.with_suffix(".json"), json.dumps(report) + "\n")
    text = gpu_tables.markdown(report)  # in place of the page's own, with all that is no step
    write_atomic(out.with_suffix(".md"), text)
    print(text)
    return status


def why(asked: bool) -> str:
    return "as asked" if asked else f"torch {torch.__version__} sees no CUDA device"


def told(outcome: Outcome) -> str:
    return f"{outcome.case.name}: {outcome.problem or f'{outcome.seconds:.1f} s'}"


# What is measured, in the order of what matters most: the last are left out first.


def cases(out: Path) -> list[Case]:
    base, large, huge = VITS
    explicit = [memory(method, vit, attention="explicit") for vit in VITS for method in METHODS[:4]]
    return [
        *steps([base], FLOAT, "none"),
        turns(base, FLOAT),
        *(layer(shape, FLOAT) for shape in LAYERS),
        recorded(base, out),
        *steps([large, huge], FLOAT, "none"),
        *steps([base], HALF, "block"),
        turns(base, HALF),
        turns(large, FLOAT, METHODS),
        turns(huge, FLOAT, METHODS[:3]),  # all there at once
        *explicit,
        *(layer(shape, HALF) for shape in LAYERS),
        *steps([large, huge], HALF, "block"),
        turns(large, HALF, METHODS),
        turns(huge, HALF, METHODS[:3]),
        *steps(VITS, HALF, "none"),
        *steps(VITS, FLOAT, "block"),
        *(memory(method, base, batch) for batch in (1, 32) for method in METHODS),
        *(memory(method, tower, precision=HALF) for tower in TOWERS for method in METHODS[:5]),
        *(memory(method, vit) for vit in VITS for method in MORE),
        *(memory(method, vit, precision=HALF, remat="block") for vit in VITS for method in MORE),
    ]


def rehearsed(out: Path) -> list[Case]:
    """The same kinds in small."""
    vit, tower = SMALL
    return [
        *steps([vit], FLOAT, "none"),
        turns(vit, FLOAT, METHODS[:3], rounds=2),
        layer({"in_features": 96, "out_features": 384, "tokens": 8 * 17, "rank": 8}, FLOAT, rounds=3),
        layer({"in_features": 96, "out_features": 384, "tokens": 8 * 17, "rank": 8}, HALF, rounds=3),
        recorded(vit, out),
        memory("SNELL-8", vit, attention="explicit"),
        memory("SNELL-8", vit, precision=HALF, remat="block"),
        memory("SNELL-8", vit, batch=32),
        memory("SNELL-8", tower),
    ]


def steps(backbones: Sequence[str], precision: str, remat: str) -> list[Case]:
    return [memory(m, backbone, precision=precision, remat=remat) for backbone in backbones for m in METHODS]


def memory(
    method: str, backbone: str, batch: int = BATCH, precision: str = FLOAT, remat: str = "none",
    attention: str = "fused",
) -> Case:  # fmt: skip
    labels = labels_of(backbone, batch, precision, remat, attention)
    name = f"{method} on {backbone}, batch {batch}, {precision}, remat {remat}, attention {attention}"
    return Case(name, "memory", {"labels": {"method": method, **labels}})


def labels_of(backbone: str, batch: int, precision: str, remat: str, attention: str) -> dict[str, Any]:
    return {"backbone": backbone, "batch": batch, "precision": precision, "remat": remat, "attention": attention}


def turns(backbone: str, precision: str, methods: Sequence[str] = (*METHODS, MORE[-1]), rounds: int = ROUNDS) -> Case:
    labels = labels_of(backbone, BATCH, precision, "none", "fused")
    said = {"labels": labels, "methods": list(methods), "rival": PEFT, "rounds": rounds}
    return Case(f"steps of {backbone} in {precision}", "steps", said)


def layer(case: dict[str, int], precision: str, rounds: int = ROUNDS) -> Case:
    name = f"operator {case['in_features']}x{case['out_features']} in {precision}"
    return Case(name, "operator", {"case": case, "precision": precision, "rounds": rounds})


def recorded(backbone: str, out: Path) -> Case:
    file = out.absolute().with_name(f"{out.name}_snapshot.pickle")
    labels = {"method": "SNELL-8", **labels_of(backbone, BATCH, FLOAT, "none", "fused")}
    return Case(f"snapshot of SNELL-8 on {backbone}", "snapshot", {"labels": labels, "file": str(file)})


# How it is measured.


class Runner:
    """Runs cases in processes of their own until the deadline (time.monotonic's); one at a time has the device."""

    def __init__(self, device: str, limit_s: float, deadline: float) -> None:
        self.device, self._limit_s, self._deadline = device, limit_s, deadline
        self._told: dict[str, Any] = {"device": device, "capability": AMPERE}
        # Two at a time with as many threads each as there are cores wait for each other.
        self._environment = os.environ | ({"OMP_NUM_THREADS": "1"} if device == "cpu" else {})
        self._turn, self._running = threading.Lock(), set[subprocess.Popen[str]]()

    def knows(self, about: dict[str, Any]) -> None:
        """What all cases are told of the machine."""
        self._told["capability"] = about["capability"]
        about["idle_bytes"] = used_bytes(about.get("uuid"))

    def all(self, chosen: Sequence[Case]) -> Iterator[Outcome]:
        """As they are done. Whoever stops listening stops them."""
        ahead = 2 if self.device == "cpu" else min(max((os.cpu_count() or 1) // 2, 1), 4)
        pool = ThreadPoolExecutor(ahead)
        try:
            for future in as_completed([pool.submit(self, case) for case in chosen]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self._running):
                process.kill()

    def __call__(self, case: Case) -> Outcome:
        begin = time.monotonic()
        if self._deadline - begin < LEAST_S:
            return Outcome(case, 0.0, problem="left out: the time is over")
        told = json.dumps({"kind": case.kind, **self._told, **case.said})
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                [sys.executable, str(CASE), told],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=self._environment,
            ) as process,
        ):  # fmt: skip
            self._running.add(process)
            try:
                output, late = self._follow(process)
            finally:
                self._running.discard(process)
            errors.seek(0)
            lines = errors.read().strip().splitlines()
        seconds = time.monotonic() - begin
        if late:
            return Outcome(case, seconds, problem=late)
        if process.returncode:
            last = lines[-1][:MOST_WORDS] if lines else "without a word"
            return Outcome(case, seconds, problem=f"failed (status {process.returncode}): {last}")
        return Outcome(case, seconds, json.loads(output.splitlines()[-1]))

    def _follow(self, process: subprocess.Popen[str]) -> tuple[str, str | None]:
        """To its end: what it put out at last; and the problem, where its time was over before."""
        assert process.stdin is not None
        assert process.stdout is not None
        with self._ends_in_time(process) as late:
            for line in process.stdout:
                if line == "ready\n":
                    break
        if late:
            return "", late[0]
        with self._turn, self._ends_in_time(process) as late:
            with suppress(BrokenPipeError):
                process.stdin.write("go\n")
                process.stdin.close()
            output = process.stdout.read()
            process.wait()
        return output, late[0] if late else None

    @contextmanager
    def _ends_in_time(self, process: subprocess.Popen[str]) -> Iterator[list[str]]:
        """Kills it where its limit or the deadline comes first; the list then has the problem."""
        left, late = max(self._deadline - time.monotonic(), 0.0), list[str]()

        def end() -> None:
            slow = self._limit_s < left
            late.append(f"too slow: more than {self._limit_s:g} s" if slow else "left out: the time was over midway")
            process.kill()

        timer = threading.Timer(min(self._limit_s, left), end)
        timer.start()
        try:
            yield late
        finally:
            timer.cancel()


def used_bytes(uuid: str | None) -> int | None:
    """What others have of the GPU, by the driver, while no case runs."""
    if uuid is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")).used)
    except pynvml.NVMLError:
        return None


if __name__ == "__main__":
    sys.exit(main())
