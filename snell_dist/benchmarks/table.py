"""The table of a benchmark: tasks down, methods across, the paper's figures beside ours, and how each was chosen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snell_dist.benchmarks import Benchmark

MARK = "†"  # chosen on the test images
NONE = "-"


@dataclass(frozen=True)
class Result:
    """One run of the matrix: its summary, or why it has none (None: it has not run yet)."""

    method: str
    task: str
    seed: int
    summary: Mapping[str, Any] | None = None
    failed: str | None = None


@dataclass(frozen=True)
class Entry:
    """One field, in percent: mean and standard deviation over seeds (None for one seed)."""

    mean: float
    deviation: float | None
    seeds: int
    marked: bool

    def __str__(self) -> str:
        spread = "" if self.deviation is None else f" ± {self.deviation:.1f}"
        return f"{self.mean:.1f}{spread}{MARK if self.marked else ''}"


@dataclass(frozen=True)
class Table:
    """`entries` by (method, column)."""

    benchmark: Benchmark
    methods: Sequence[str]
    tasks: Sequence[str]
    results: Sequence[Result]
    entries: Mapping[tuple[str, str], Entry] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Those that these tasks can fill."""
        return [c for c in self.benchmark.columns if set(_members(self.benchmark, c)) <= set(self.tasks)]

    def markdown(self) -> str:
        head = ["", *self.methods]
        lines = [head, ["---", *["---:"] * len(self.methods)]]
        lines += [[column, *(self.field(method, column) for method in self.methods)] for column in self.columns]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return "\n\n".join([table, *self.remarks()]) + "\n"

    def field(self, method: str, column: str) -> str:
        entry, paper = self.entries.get((method, column)), self.benchmark.reported(method, column)
        wanted = len({r.seed for r in self.results})
        said = NONE if entry is None else str(entry)
        if entry is not None and entry.seeds < wanted:
            said += f" [{entry.seeds} of {wanted}]"
        return said if paper is None else f"{said} ({paper})"

    def remarks(self) -> list[str]:
        """What a reader must know of the figures."""
        done = [r for r in self.results if r.summary]
        seeds = len({r.seed for r in self.results})
        said = [f"Top-1 accuracy on test in percent, mean ± standard deviation over {seeds} seeds. {len(done)} of"
                f" {len(self.results)} runs are done."]  # fmt: skip
        if self.benchmark.source:
            said[0] += f" In brackets: {self.benchmark.source}."
        rules = sorted({_rule(r.summary["protocol"]) for r in done if r.summary})
        said += [f"{MARK if 'TEST' in rule else ''}{rule}." for rule in rules]
        data = {(r.task, r.summary["protocol"]["data_sha256"][:12]) for r in done if r.summary}
        if data:
            said.append("Data: " + ", ".join(f"{task} {digest}" for task, digest in sorted(data)) + ".")
        reasons = dict.fromkeys(r.failed for r in self.results if r.failed)
        for reason in reasons:
            runs = [f"{r.method} on {r.task} seed {r.seed}" for r in self.results if r.failed == reason]
            said.append(f"Failed: {', '.join(runs)}: {reason}.")
        return said


def _rule(card: Mapping[str, Any]) -> str:
    """How a run's weights were chosen, and from which images it learned; the same words for runs under one rule."""
    rules = {
        "val": "Weights of the best look at val; test looked at once",
        "last": "Last weights; test looked at once",
        "paper_compat": "The best of several looks at the TEST images, as the released code does",
    }
    trained = "train and val" if card["val_trains"] else "train without val"
    seen = f"resize {card['resize']}; normalisation {card['normalisation']}"
    return f"{rules[card['select']]}; learned from {trained}; {seen}"


def make(benchmark: Benchmark, methods: Sequence[str], tasks: Sequence[str], results: Sequence[Result]) -> Table:
    """Group means are formed for each seed, then averaged over seeds; one with a missing task has no figure."""
    entries = {}
    for method in methods:
        mine = [r for r in results if r.method == method and r.summary]
        seeds = sorted({r.seed for r in mine})
        found = {(r.task, r.seed): 100 * r.summary["test_accuracy"] for r in mine if r.summary}
        marked = {r.task for r in mine if r.summary and r.summary["protocol"]["marked"]}
        for column in benchmark.columns:
            values = [value for seed in seeds if (value := _value(benchmark, column, found, seed)) is not None]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else None
                chosen_on_test = bool(marked & set(_members(benchmark, column)))
                entries[method, column] = Entry(statistics.fmean(values), deviation, len(values), chosen_on_test)
    return Table(benchmark, methods, tasks, results, entries)


def _value(benchmark: Benchmark, column: str, found: Mapping[tuple[str, int], float], seed: int) -> float | None:
    if any((task, seed) not in found for task in _members(benchmark, column)):
        return None
    if column == "mean of groups":
        means = [statistics.fmean(found[task, seed] for task in tasks) for tasks in benchmark.groups.values()]
        return statistics.fmean(means)
    return statistics.fmean(found[task, seed] for task in _members(benchmark, column))


def _members(benchmark: Benchmark, column: str) -> list[str]:
    """The tasks that a column is made of."""
    if column in benchmark.tasks:
        return [column]
    return benchmark.groups.get(column, benchmark.tasks)
