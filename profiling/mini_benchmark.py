"""The embedded mini-benchmark: eight methods on eight small tasks of real images, three seeds, two CPU cores.

    python profiling/mini_benchmark.py             all of it, and profiling/results/mini.md, .json and .png
    python profiling/mini_benchmark.py --search    first: the learning rate of each method, chosen on val

It shows relations between methods, on a ViT of 0.2 million parameters: every method has the same base, images,
number of epochs, and as many learning rates to choose from.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mini_tasks
from demo import environment, where_run

RESULTS = Path(__file__).parent / "results"
LEARNING_RATES = "1.0e-3", "3.0e-3", "1.0e-2", "3.0e-2", "1.0e-1", "3.0e-1"
# SNELL's ranks share the rate that rank 8 chose.
SEARCHED = "snell8", "lora", "sparse", "full", "linear", "bias"
SEARCH_TASKS = "digits", "surfaces", "orientation", "counting"
COLOURS = {
    "snell8": "#e5989b", "snell16": "#d1495b", "snell32": "#8c1c2f", "lora": "#00798c", "sparse": "#6a4c93",
    "full": "#edae49", "linear": "#66717e", "bias": "#5b8e3e",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search", action="store_true", help="choose learning rates instead")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    args = parser.parse_args()
    mini_tasks.build(Path("runs/mini-data"))  # where configs/mini look for it
    return search(args.out, args.jobs) if args.search else benchmark(args.out, args.jobs)


def benchmark(out: Path, jobs: int) -> int:
    begin = time.perf_counter()
    status = reproduce(out / "mini", jobs)
    if status:
        return status
    seconds = time.perf_counter() - begin
    folder = out / "mini" / "mini"
    results = [r for r in json.loads((folder / "table.json").read_text()) if r["summary"]]
    RESULTS.mkdir(exist_ok=True)
    report = {"environment": environment(), "seconds": seconds, "costs": costs(results), "results": brief(results)}
    (RESULTS / "mini.json").write_text(json.dumps(report, indent=1) + "\n")
    (RESULTS / "mini.md").write_text(markdown(report, (folder / "table.md").read_text()))
    draw(report, RESULTS / "mini.png")
    print((RESULTS / "mini.md").read_text())
    return 0


def reproduce(out: Path, jobs: int, *arguments: str) -> int:
    """`snell reproduce mini` in a process of its own."""
    command = [sys.executable, "-m", "snell_dist", "reproduce", "mini", *arguments]
    return subprocess.run([*command, "--out", str(out), "--jobs", str(jobs)], stdout=subprocess.DEVNULL).returncode


def search(out: Path, jobs: int) -> int:
    """Every method gets the same learning rates on the same tasks, and the mean accuracy on val decides."""
    found: dict[tuple[str, str], float] = {}
    for rate in LEARNING_RATES:
        place = out / f"mini-search-{rate}"
        chosen = "--methods", *SEARCHED, "--tasks", *SEARCH_TASKS, "--seeds", "1"
        status = reproduce(place, jobs, *chosen, f"optim.lr={rate}")
        if status:
            return status
        for method in SEARCHED:
            done = [r["summary"] for r in json.loads((place / "mini/table.json").read_text()) if r["method"] == method]
            found[method, rate] = 100 * statistics.fmean(summary["val_accuracy"] for summary in done)
    head = ["lr", *SEARCHED]
    lines = [head, ["---", *["---:"] * len(SEARCHED)]]
    for rate in LEARNING_RATES:
        best = {method: max(LEARNING_RATES, key=lambda r, m=method: found[m, r]) for method in SEARCHED}
        fields = [f"**{found[m, rate]:.1f}**" if best[m] == rate else f"{found[m, rate]:.1f}" for m in SEARCHED]
        lines.append([rate, *fields])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    said = f"Mean accuracy on val in percent over {', '.join(SEARCH_TASKS)}; seed 0; the rest as in configs/mini."
    text = f"{table}\n\n{said} SNELL-16 and 32 take SNELL-8's rate.\n\n{signature()}\n"
    (RESULTS / "mini_search.md").write_text(text)
    print(text)
    return 0


def brief(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the table and the picture are made of."""
    keys = "test_accuracy", "val_accuracy", "trainable_parameters", "median_step_s", "peak_memory_mib"
    return [
        {key: r[key] for key in ("method", "task", "seed")} | {key: r["summary"][key] for key in keys} for r in results
    ]


def costs(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each method: medians over its runs. The head's size depends on the task, so it is left out of the count."""
    found = {}
    for method in dict.fromkeys(r["method"] for r in results):
        mine = [r["summary"] for r in results if r["method"] == method]
        found[method] = {
            "adapter_parameters": mine[0]["trainable_parameters"] - 65 * len(mine[0]["classes"]),
            "median_step_ms": 1000 * statistics.median(s["median_step_s"] for s in mine),
            "peak_memory_mib": statistics.median(s["peak_memory_mib"] for s in mine),
        }
    return found


def markdown(report: dict[str, Any], table: str) -> str:
    head = ["", *report["costs"]]
    rows = {
        "parameters beside the head": ("adapter_parameters", "{:,.0f}"),
        "median step, ms": ("median_step_ms", "{:.0f}"),
        "peak memory, MiB": ("peak_memory_mib", "{:.1f}"),
    }
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[name, *(form.format(c[key]) for c in report["costs"].values())] for name, (key, form) in rows.items()]
    costs = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    steps = "Steps of 50 images on one thread, two runs at a time."
    return f"{table}\n{costs}\n\n{steps} {report['seconds'] / 60:.0f} minutes in all.\n\n{signature()}\n"


def signature() -> str:
    return where_run(environment())


def draw(report: dict[str, Any], file: Path) -> None:
    """Each task's accuracy by method, every seed a point; then the mean over tasks against what a step costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    )
    results, methods = report["results"], list(report["costs"])
    tasks = list(dict.fromkeys(r["task"] for r in results))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=[2.2, 1], layout="constrained")
    for m, method in enumerate(methods):
        for t, task in enumerate(tasks):
            values = [100 * r["test_accuracy"] for r in results if (r["method"], r["task"]) == (method, task)]
            x = t + (m - (len(methods) - 1) / 2) * 0.095
            left.vlines(x, min(values), max(values), color=COLOURS[method], linewidth=1)
            left.plot([x] * len(values), values, ".", color=COLOURS[method], markersize=4, alpha=0.6)
            left.plot(x, statistics.fmean(values), "o", color=COLOURS[method], label=method if t == 0 else None)
    for t in range(len(tasks) - 1):
        left.axvline(t + 0.5, color="#eeeeee", linewidth=1)
    left.set(title="Test accuracy (%), three seeds and their mean", ylim=(0, 101), xlim=(-0.5, len(tasks) - 0.5))
    left.set_xticks(range(len(tasks)), tasks)
    left.legend(frameon=False, ncols=4, loc="lower left")
    spots = {
        method: (
            report["costs"][method]["median_step_ms"],
            statistics.fmean(100 * r["test_accuracy"] for r in results if r["method"] == method),
        )
        for method in methods
    }
    for method, (step, mean) in spots.items():
        right.plot(step, mean, "o", color=COLOURS[method], markersize=8)
        crowded = any(0 < other - step < 8 and abs(height - mean) < 0.5 for other, height in spots.values())
        offset, side = ((-7, -3), "right") if crowded else ((7, -3), "left")
        right.annotate(method, (step, mean), xytext=offset, textcoords="offset points", fontsize=9, ha=side)
    right.set(title="Mean over tasks (%) against a step's time (ms)")
    right.set_xlim(left=0)
    right.margins(x=0.25, y=0.15)
    right.grid(color="#f2f2f2")
    figure.supxlabel(signature().partition(" `")[0], fontsize=7, color="#888888", x=0.01, ha="left")
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
