"""Benchmarks: their tasks, how tasks make a mean, and what the paper reports. One YAML file a benchmark."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import Field

from snell_dist.config import Section, UserError, check, nearest

FOLDER = Path(__file__).parent


class Paper(Section):
    """One of the paper's tables: a row a method, in percent."""

    table: str
    columns: list[str]  # tasks, groups, or kinds of mean
    rows: dict[str, list[float]]


class Benchmark(Section):
    """`methods`: ours, by the configurations `<benchmark>/<task>_<method>` or `<benchmark>/<method>`, and the paper's
    row of each, if it has one.
    """

    about: str
    root: str = Field(description="where the data is, if nothing else is said")
    groups: dict[str, list[str]]  # of tasks, in the order of columns
    methods: dict[str, str | None]
    source: str | None = None  # of the paper's tables
    paper: list[Paper] = Field([])

    @property
    def tasks(self) -> list[str]:
        return [task for group in self.groups.values() for task in group]

    @property
    def columns(self) -> list[str]:
        """Tasks; then, where there are several groups, theirs and the mean of these; then the mean of tasks."""
        groups = [*self.groups, "mean of groups"] if len(self.groups) > 1 else []
        return [*self.tasks, *groups, "mean of tasks"]

    def reported(self, method: str, column: str) -> float | None:
        """The paper's figure in percent, if it has one."""
        row = self.methods.get(method)
        for table in self.paper:
            if row in table.rows and column in table.columns:
                return table.rows[row][table.columns.index(column)]
        return None


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find(name: str) -> Benchmark:
    """UserError where there is none of this name."""
    if name not in names():
        known = ", ".join(names())
        raise UserError(f"reproduce: {name!r}: no such benchmark{nearest(name, names())} (allowed: {known})")
    return check(yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")), Benchmark)
