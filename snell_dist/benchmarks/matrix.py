"""A benchmark's whole matrix of methods, tasks and seeds: run or resumed, and its table at any moment.

    OUT/<benchmark>/<method>/<task>/seed<k>/     a run folder each; bases are trained beside OUT
    OUT/<benchmark>/table.md  table.json         written anew after every run

A cell is the shipped configuration <benchmark>/<task>_<method>, or <benchmark>/<method> with data.dataset=<task>.
Processes that share OUT divide the work: a cell that another one holds, or has finished, is left to it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from snell_dist import dist, job, log, run_folder, weights
from snell_dist.benchmarks import Benchmark, find, table
from snell_dist.config import Loaded, UserError, load, nearest, shipped
from snell_dist.run_config import Run

FAILED = "failed.txt"
ITSELF = {"train.seed": "--seeds", "data.dataset": "--tasks"}  # what the matrix goes over, so no override


@dataclass(frozen=True)
class Wish:
    """What is to be reproduced. `share` (i, n): every n-th cell, from the i-th (from 1)."""

    benchmark: str
    data: str | None
    tasks: Sequence[str]
    methods: Sequence[str]
    seeds: int
    out: Path
    overrides: Sequence[str]
    share: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Cell:
    method: str
    task: str
    seed: int
    folder: Path
    loaded: Loaded[Run]


@dataclass(frozen=True)
class Matrix:
    benchmark: Benchmark
    methods: list[str]
    tasks: list[str]
    folder: Path
    cells: list[Cell]

    def table(self) -> table.Table:
        """From what the run folders say now."""
        return table.make(self.benchmark, self.methods, self.tasks, [_result(cell) for cell in self.cells])

    def write(self) -> None:
        made = self.table()
        results = [asdict(result) for result in made.results]
        run_folder.write_atomic(self.folder / "table.md", made.markdown())
        run_folder.write_atomic(self.folder / "table.json", json.dumps(results, indent=1))


def plan(wish: Wish) -> Matrix:
    """The matrix, all of it checked. ConfigError or UserError with every problem of names and settings."""
    benchmark = find(wish.benchmark)
    for override in wish.overrides:
        if (key := override.partition("=")[0]) in ITSELF:
            raise UserError(f"reproduce: {override}: {key} differs from run to run; say {ITSELF[key]} instead")
    tasks = _chosen("--tasks", wish.tasks, benchmark.tasks)
    methods = _chosen("--methods", wish.methods, list(benchmark.methods))
    folder = wish.out / wish.benchmark
    cells = []
    for method in methods:
        for task in tasks:
            found = _recipe(wish, benchmark, method, task)
            if found is None:
                continue
            for seed in range(wish.seeds):
                config = found.config.model_copy(update={"train": found.config.train.model_copy(update={"seed": seed})})
                place = folder / method / task / f"seed{seed}"
                cells.append(Cell(method, task, seed, place, replace(found, config=config)))
    if not cells:
        raise UserError(f"reproduce: none of {', '.join(methods)} has a configuration for {', '.join(tasks)}")
    return Matrix(benchmark, methods, tasks, folder, cells)


def check(matrix: Matrix) -> None:
    """UserError with all that would stop a cell: missing data or weights, a folder of another configuration."""
    problems = []
    for cell in {cell.task: cell for cell in matrix.cells}.values():
        try:
            cell.loaded.config.data.load(cell.loaded.config.protocol.all_labelled)
        except UserError as error:
            problems.append(f"{cell.task}: {error}")
    undone = [cell for cell in matrix.cells if not run_folder.is_complete(cell.folder)]
    for said in dict.fromkeys(cell.loaded.config.backbone.weights for cell in undone):
        if said is not None and not said.startswith("config:") and weights.is_source(said):
            try:
                weights.read(said)
            except UserError as error:
                problems.append(
                    f"{error}; name another, or backbone.weights=orig_in21k to download the paper's ViT-B/16"
                )
    for cell in matrix.cells:
        if (cell.folder / "config.yaml").exists():
            different = run_folder.differences(cell.folder, cell.loaded.config)
            if different:
                problems.append(
                    f"{cell.folder}: was made by another configuration (they differ in {', '.join(different)});"
                    " name another --out"
                )
    if problems:
        raise UserError("\n".join(problems))


def run(wish: Wish) -> tuple[Matrix, bool]:
    """Runs this share of the cells, one after the other. Returns the matrix and whether it was interrupted."""
    matrix = plan(wish)
    check(matrix)
    begin = time.time()
    first, step = wish.share
    for cell in matrix.cells[first - 1 :: step]:
        try:
            with run_folder.lock(cell.folder.parent, f".{cell.folder.name}.lock"):
                if run_folder.is_complete(cell.folder) or _failed_since(begin, cell):
                    continue
                log.info(f"{cell.method}, {cell.task}, seed {cell.seed}")
                (cell.folder / FAILED).unlink(missing_ok=True)
                outcome = job.run(cell.loaded, wish.out.parent, (cell.folder / "config.yaml").exists(), cell.folder)
                if outcome.interrupted:
                    return matrix, True
        except run_folder.Busy:
            continue
        except job.Interrupted:
            return matrix, True
        except UserError as error:
            cell.folder.mkdir(parents=True, exist_ok=True)
            run_folder.write_atomic(cell.folder / FAILED, str(error))
            log.info(f"{cell.method}, {cell.task}, seed {cell.seed} failed: {error}")
        with run_folder.lock(matrix.folder, patience_s=float("inf")):
            matrix.write()
    return matrix, False


def _failed_since(begin: float, cell: Cell) -> bool:
    """Whether another process tried it meanwhile: it need not fail once for each of them."""
    file = cell.folder / FAILED
    return file.exists() and file.stat().st_mtime >= begin


def spawn(arguments: Sequence[str], jobs: int) -> int:
    """Starts `jobs` processes of `snell reproduce` with these arguments, a GPU or a share of the cores each.

    They divide the cells among them. Returns the largest exit status.
    """
    gpus = _visible_gpus()
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    children = []
    for i in range(jobs):
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
        command = [sys.executable, "-m", "snell_dist", "reproduce", *arguments, "--jobs", "1"]
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))

    def forward(number: int, frame: object) -> None:
        for child in children:  # never SIGINT: Ctrl-C has reached them already, and the second one loses the step
            child.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in dist.SIGNALS}
    try:
        statuses = [child.wait() for child in children]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    killed = [-status for status in statuses if status < 0]
    if killed:
        raise UserError(
            f"reproduce: a process was ended by signal {killed[0]}; the same command goes on where it stood"
        )
    return max(statuses)


def share_of_array() -> tuple[int, int] | None:
    """This task's share in a Slurm job array, (i, n). UserError where the array has gaps."""
    said = [os.environ.get(f"SLURM_ARRAY_TASK_{key}") for key in ("ID", "MIN", "MAX", "STEP", "COUNT")]
    if None in said:
        return None
    task, first, last, step, count = (int(number) for number in said if number)
    if last - first != step * (count - 1):
        raise UserError(
            f"SLURM_ARRAY_TASK_ID = {task}: the array has gaps ({count} tasks from {first} to {last}), so nobody would"
            f" do their share; submit --array=0-{count - 1}, or say --share I/N"
        )
    return (task - first) // step + 1, count


def _visible_gpus() -> list[str]:
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [name for name in said.split(",") if name]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _chosen(option: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    wrong = [name for name in wanted if name not in known]
    if wrong:
        raise UserError(
            "\n".join(f"{option} {n}: unknown{nearest(n, known)} (allowed: {', '.join(known)})" for n in wrong)
        )
    return list(wanted or known)


def _recipe(wish: Wish, benchmark: Benchmark, method: str, task: str) -> Loaded[Run] | None:
    """The configuration of a cell; None where a method has none for this task."""
    root = wish.data or benchmark.root
    own, general = f"{wish.benchmark}/{task}_{method}", f"{wish.benchmark}/{method}"
    if own in shipped():
        return load(own, [f"data.root={root}", *wish.overrides], Run)
    if general in shipped():
        return load(general, [f"data.root={root}", f"data.dataset={task}", *wish.overrides], Run)
    return None


def _result(cell: Cell) -> table.Result:
    summary, failed = None, None
    if run_folder.is_complete(cell.folder):
        summary = run_folder.read_summary(cell.folder)
    elif (cell.folder / FAILED).exists():
        failed = (cell.folder / FAILED).read_text()
    return table.Result(cell.method, cell.task, cell.seed, summary, failed)
