"""Trains several configurations one after the other and compares them: a table and a picture.

    python profiling/demo.py [CONFIG ...] [--out runs]      (default: the demo and its three rivals)

Each configuration runs in a process of its own, so that no figure contains another's memory or warm-up.
Writes comparison.json, comparison.md and comparison.png into a new folder under OUT/demo.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

DEMO = ["demo", "demo/lora", "demo/full", "demo/linear"]
COLOURS = {"snell": "#d1495b", "lora": "#00798c", "full": "#edae49", "linear": "#66717e"}
LAYER = "blocks.2.attn.proj"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=DEMO)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()
    begin = time.perf_counter()
    results = []
    for config in args.configs:
        print(f"\n{config}", file=sys.stderr)
        folder = train(config, args.out)
        if folder is None:
            return 2
        results.append({"config": config, "folder": str(folder), **json.loads((folder / "summary.json").read_text())})
    target = new_folder(args.out / "demo")
    report = {"environment": environment(), "seconds": time.perf_counter() - begin, "results": results}
    (target / "comparison.json").write_text(json.dumps(report, indent=2))
    (target / "comparison.md").write_text(markdown(report))
    print_table(results)
    draw(results, report["environment"], target / "comparison.png")
    print(f"\n{target}/comparison.png  ({report['seconds']:.0f} s)")
    return 0


def train(config: str, out: Path) -> Path | None:
    """Runs `snell train` and returns its run folder; None where it failed, having said why."""
    command = [sys.executable, "-m", "snell_dist", "train", config, "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return Path(done.stdout.split()[-1]) if done.returncode == 0 else None


def new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    folder = parent / f"{number:03d}"
    folder.mkdir()
    return folder


def environment() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("snell_dist", "torch", "timm")},
        "command": f"python {' '.join(sys.argv)}",
    }


def where_run(said: dict[str, Any]) -> str:
    """An `environment`, in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    return f"{said['date']}, {said['machine']}, Python {said['python']}, {versions}. `{said['command']}`"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


HEADINGS = ["method", "trainable parameters", "test accuracy", "median step", "peak memory"]


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            r["method"],
            f"{r['trainable_parameters']:,} ({r['trainable_parameters'] / r['parameters']:.1%})",
            f"{r['test_accuracy']:.1%}",
            "not measured" if r["median_step_s"] is None else f"{r['median_step_s'] * 1000:.1f} ms",
            "not measured" if r["peak_memory_mib"] is None else f"{r['peak_memory_mib']:.1f} MiB",
        ]
        for r in results
    ]


def markdown(report: dict[str, Any]) -> str:
    lines = [HEADINGS, ["---"] + ["---:"] * 4, *rows(report["results"])]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    said = report["environment"]
    return f"{table}\n\n{where_run(said)}\n"


def print_table(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results[0]['steps']} steps each; test: {results[0]['test_images']} images, looked at once")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left")
    for row in rows(results):
        table.add_row(*row)
    Console(width=100 if not sys.stdout.isatty() else None).print(table)


def adapted_model(result: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The run's final model with its deltas merged, the weights of its base, and the data's splits."""
    import torch

    from snell_dist import adapter, methods
    from snell_dist.build import build
    from snell_dist.config import load
    from snell_dist.run_config import Run

    folder = Path(result["folder"])
    built = build(load(str(folder / "config.yaml"), [], Run).config, result["base_weights"], torch.device("cpu"))
    model = built.engine.model
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = adapter.load(folder / adapter.ADAPTER, built.engine.weights(), built.fingerprint)
    built.engine.load_weights(trained)
    return methods.merge(model).eval(), base, built.splits


def draw(results: list[dict[str, Any]], said: dict[str, Any], file: Path) -> None:
    """Learning curves, what each method costs, what it did to one layer, and what the first one sees."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    )
    figure = plt.figure(figsize=(12, 8.2), layout="constrained")
    curves, costs, deltas, images = figure.subfigures(2, 2, width_ratios=[1, 1.25]).flat
    draw_curves(curves.subplots(), results)
    draw_costs(costs.subplots(1, 4, sharey=True), results)
    models = [adapted_model(r) for r in results]
    draw_deltas(deltas, results, models)
    draw_images(images, results[0], models[0])
    versions = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    figure.supxlabel(f"{said['date']}   {said['machine']}   {versions}", fontsize=7, color="#888888", x=0.01, ha="left")
    figure.savefig(file, dpi=130)


def draw_curves(axes: Any, results: list[dict[str, Any]]) -> None:
    for r in results:
        records = map(json.loads, (Path(r["folder"]) / "metrics.jsonl").read_text().splitlines())
        points = [(record["step"] + 1, 100 * record["val_accuracy"]) for record in records if "val_accuracy" in record]
        axes.plot(*zip(*points, strict=True), color=colour(r), marker="o", markersize=3, linewidth=2, label=r["method"])
    axes.set(title="Validation accuracy (%)", xlabel="step", ylim=(0, 102))
    axes.legend(frameon=False, loc="lower right")
    axes.grid(axis="y", color="#eeeeee")


def draw_costs(axes: Any, results: list[dict[str, Any]]) -> None:
    panels = [
        ("Test accuracy (%)", lambda r: 100 * r["test_accuracy"], "{:.1f}"),
        ("Trainable parameters", lambda r: r["trainable_parameters"], "{:,.0f}"),
        ("Median step (ms)", lambda r: 1000 * (r["median_step_s"] or 0), "{:.1f}"),
        ("Peak memory (MiB)", lambda r: r["peak_memory_mib"] or 0, "{:.1f}"),
    ]
    for ax, (title, value, form) in zip(axes, panels, strict=True):
        bars = ax.barh([r["method"] for r in results], [value(r) for r in results], color=[colour(r) for r in results])
        ax.bar_label(bars, [form.format(value(r)) for r in results], padding=3, fontsize=8)
        ax.set_title(title, fontsize=9)
        ax.margins(x=0.35)
        ax.set_xticks([])
        ax.spines.bottom.set_visible(False)
    axes[0].invert_yaxis()


def draw_deltas(figure: Any, results: list[dict[str, Any]], models: list[Any]) -> None:
    """|delta| of one layer, each on its own scale: what each method can change."""
    figure.suptitle(f"What training added to {LAYER}.weight (dark: more)", x=0.02, ha="left", fontsize=10)
    chosen = [(r, m) for r, m in zip(results, models, strict=True) if r["method"] != "linear"]
    for ax, (r, (model, base, _)) in zip(figure.subplots(1, len(chosen), squeeze=False).flat, chosen, strict=True):
        delta = (model.state_dict()[f"{LAYER}.weight"] - base[f"{LAYER}.weight"]).abs().numpy()
        ax.imshow(delta, cmap="magma_r", vmax=sorted(delta.flat)[int(0.995 * delta.size)], interpolation="nearest")
        ax.set_title(f"{r['method']}: {(delta > 0).mean():.0%} of entries", fontsize=9, color=colour(r))
        ax.set_xticks([])
        ax.set_yticks([])


def draw_images(
    figure: Any, result: dict[str, Any], adapted: tuple[Any, Any, Any], columns: int = 12, lines: int = 5
) -> None:
    import torch

    model, _, splits = adapted
    chosen = [splits.test[i] for i in range(0, len(splits.test), max(1, len(splits.test) // (columns * lines)))]
    chosen = chosen[: columns * lines]
    with torch.no_grad():
        predicted = model(torch.stack([image for image, _ in chosen])).argmax(1).tolist()
    figure.suptitle(f"Test images and what {result['method']} reads (red: wrong)", x=0.02, ha="left", fontsize=10)
    for ax, (image, label), guess in zip(figure.subplots(lines, columns).flat, chosen, predicted, strict=False):
        ax.imshow(image[0], cmap="gray_r")
        ax.set_title(splits.classes[guess], fontsize=8, pad=2, color="#222222" if guess == label else "#d1495b")
    for ax in figure.axes:
        ax.axis("off")


def colour(result: dict[str, Any]) -> str:
    return COLOURS.get(result["method"], "#444444")


if __name__ == "__main__":
    sys.exit(main())
