"""The table of a benchmark: against numpy, with missing cells, marks and failures."""

from typing import Any

import numpy as np
import pytest

from snell_dist import benchmarks
from snell_dist.benchmarks.table import MARK, Result, make
from snell_dist.config import UserError

VTAB = benchmarks.find("vtab")


def summary(accuracy: float, select: str = "val") -> dict[str, Any]:
    marked = select == "paper_compat"
    card = {
        "data_sha256": "0" * 64,
        "select": select,
        "marked": marked,
        "val_trains": marked,
        "resize": "r",
        "normalisation": "n",
    }
    return {"test_accuracy": accuracy, "protocol": card}


def drawn(seeds: int, **what: Any) -> tuple[np.ndarray, list[Result]]:
    """Accuracies [tasks, seeds] in float64, and the runs that have them."""
    values = np.random.default_rng(7).uniform(0.2, 0.9, (len(VTAB.tasks), seeds))
    pairs = [(t, s) for t in range(len(VTAB.tasks)) for s in range(seeds)]
    return values, [Result("snell16", VTAB.tasks[t], s, summary(values[t, s], **what)) for t, s in pairs]


def test_means_and_deviations_are_numpys() -> None:
    values, results = drawn(3)
    entries = make(VTAB, ["snell16"], VTAB.tasks, results).entries
    groups, first = [], 0
    for name, tasks in VTAB.groups.items():
        part = 100 * values[first : first + len(tasks)].mean(0)
        groups.append(part)
        first += len(tasks)
        assert entries["snell16", name].mean == pytest.approx(part.mean())
        assert entries["snell16", name].deviation == pytest.approx(part.std(ddof=1))
    whole = np.mean(groups, 0)
    assert entries["snell16", "mean of groups"].mean == pytest.approx(whole.mean())
    assert entries["snell16", "mean of groups"].deviation == pytest.approx(whole.std(ddof=1))
    assert entries["snell16", "mean of tasks"].mean == pytest.approx(100 * values.mean())
    assert entries["snell16", "dtd"].mean == pytest.approx(100 * values[2].mean())


def test_the_papers_figures_stand_beside_ours() -> None:
    """Table 1's groups and their mean; table A7's tasks and theirs."""
    text = make(VTAB, ["snell16"], VTAB.tasks, drawn(1)[1]).markdown()
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    figures = {"cifar": 74.2, "smallnorb_ele": 40.6, "natural": 82.4, "mean of groups": 76.7, "mean of tasks": 74.4}
    for column, figure in figures.items():
        assert lines[column].endswith(f"({figure}) |")
    assert "SNELL (NeurIPS 2024), tables 1 and A7" in text


def test_a_missing_task_leaves_its_means_empty() -> None:
    _, results = drawn(2)
    without = [r for r in results if (r.task, r.seed) != ("dtd", 1)]
    without.append(Result("snell16", "dtd", 1, failed="the loss is nan at step 7"))
    table = make(VTAB, ["snell16"], VTAB.tasks, without)
    assert table.entries["snell16", "natural"].seeds == 1
    assert "[1 of 2]" in table.field("snell16", "natural")
    assert "[1 of 2]" in table.field("snell16", "dtd")
    assert "Failed: snell16 on dtd seed 1: the loss is nan at step 7." in table.remarks()
    none = make(VTAB, ["snell16"], VTAB.tasks, [r for r in results if r.task != "dtd"])
    assert none.field("snell16", "natural") == "- (82.4)"
    assert ("snell16", "mean of groups") not in none.entries


def test_a_number_chosen_on_test_is_marked_everywhere() -> None:
    table = make(VTAB, ["snell16"], VTAB.tasks, drawn(1, select="paper_compat")[1])
    assert all(MARK in table.field("snell16", column) for column in table.columns)
    assert any(line.startswith(MARK) and "TEST images" in line for line in table.remarks())
    honest = make(VTAB, ["snell16"], VTAB.tasks, drawn(1)[1])
    assert MARK not in honest.markdown()


def test_every_benchmark_is_whole() -> None:
    """Rows as long as their columns, columns that exist, and methods whose configurations exist."""
    from snell_dist.config import shipped

    for name in benchmarks.names():
        benchmark = benchmarks.find(name)
        for table in benchmark.paper:
            assert set(table.columns) <= set(benchmark.columns)
            assert all(len(row) == len(table.columns) for row in table.rows.values())
        for method, row in benchmark.methods.items():
            assert (
                any(f"{name}/{task}_{method}" in shipped() for task in benchmark.tasks)
                or f"{name}/{method}" in shipped()
            )
            assert row is None or any(row in table.rows for table in benchmark.paper)
    with pytest.raises(UserError, match=r"'vtap': no such benchmark, did you mean 'vtab'\?"):
        benchmarks.find("vtap")


def test_the_papers_means_follow_from_its_rows() -> None:
    """A transcription's slip would show: means of table 1's groups, of A7's tasks and of FGVC's datasets."""
    for name in ("vtab", "fgvc"):
        for table in benchmarks.find(name).paper:
            for row, values in table.rows.items():
                assert np.mean(values[:-1]) == pytest.approx(values[-1], abs=0.16), (name, table.table, row)
