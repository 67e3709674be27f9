"""`snell report`: run folders as one HTML page that needs nothing else, neither network nor data.

It holds the tables of reproduced benchmarks, all runs side by side, and of each run its protocol card, curves,
confusion, worst mistakes, calibration, telemetry, configuration and environment.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snell_dist import run_folder
from snell_dist.config import UserError, first_line
from snell_dist.report import _template, charts
from snell_dist.tensor_files import read_tensors

OTHERS = "take it away, or name the folders of the others"
LABELLED = 12  # classes: up to so many have a table of numbers
PAIRS = 8  # most confused pairs named
CARD = {  # in this order; what else the card holds follows
    "chosen": "weights", "test_looks": "looks at test", "dataset": "data", "split": "split", "resize": "resize",
    "normalisation": "normalisation", "augmentation": "augmentation", "train_images": "training images",
    "epochs": "epochs", "steps": "steps", "batch_size": "batch size", "seed": "seed", "data_sha256": "data SHA-256",
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """What a run folder says. `summary` is None while the run is unfinished."""

    folder: Path
    name: str
    config: dict[str, Any]
    config_text: str
    attempts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None


def write(folders: Sequence[Path], out: Path) -> int:
    """Writes the page of all runs in the folders. Returns their number.

    Raises UserError where a folder holds none or a run's file is damaged, or the template's library is missing.
    """
    template = _template.template("page.html")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out}: {'is a folder' if out.is_dir() else 'its folder is not there'}; name a file")
    shown = [_shown(number, _read(folder, folders)) for number, folder in enumerate(find(folders))]
    page = template.render(
        title=" and ".join(str(folder) for folder in folders),
        tables=_tables(folders),
        rows=[row for row, _ in shown],
        runs=[run for _, run in shown],
    )
    run_folder.write_atomic(out, page)
    return len(shown)


def find(folders: Iterable[Path]) -> list[Path]:
    """Every run folder in or below the given ones. UserError where one holds none."""
    found: list[Path] = []
    for folder in folders:
        inside = sorted(file.parent for file in folder.rglob("config.yaml") if (file.parent / "run.json").exists())
        if not inside:
            raise UserError(
                f"report: {folder}: holds no run folder" if folder.exists() else f"report: {folder}: no such folder"
            )
        found += [place for place in inside if place not in found]
    return found


def _read(folder: Path, given: Sequence[Path]) -> RunFolder:
    import yaml

    config = folder / "config.yaml"
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    metrics = []
    for line in lines:
        try:
            metrics.append(json.loads(line))
        except ValueError:  # a line that a crash cut off
            continue
    alone = len(given) == 1 and folder != given[0]  # else runs of two folders may have one name
    return RunFolder(
        folder=folder,
        name=str(folder.relative_to(given[0]) if alone else folder),
        config=_parsed(config, yaml.safe_load),
        config_text=config.read_text(encoding="utf-8"),
        attempts=_parsed(folder / "run.json"),
        metrics=metrics,
        summary=_parsed(folder / "summary.json") if run_folder.is_complete(folder) else None,
    )


def _parsed(file: Path, parse: Callable[[str], Any] = json.loads) -> Any:
    import yaml

    try:
        return parse(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"report: {file}: is damaged ({first_line(error)}); {OTHERS}") from None


def _shown(number: int, run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run in the table of all runs, and by itself."""
    try:
        return _row(number, run), _run(number, run)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"report: {run.folder}: is no whole run folder (it lacks {first_line(error)}); {OTHERS}"
        ) from None


def _tables(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Tables that `snell reproduce` wrote, as rows of fields and remarks."""
    tables = []
    for file in sorted(file for folder in folders for file in folder.rglob("table.md")):
        lines = file.read_text(encoding="utf-8").splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        remarks = [line for line in lines if line and not line.startswith("|")]
        name = str(file.parent) if len(folders) > 1 else file.parent.name
        tables.append({"name": name, "head": cells[0], "rows": cells[2:], "remarks": remarks})
    return tables


def _row(number: int, run: RunFolder) -> dict[str, Any]:
    """One line of the table of all runs: for each column a text and what it is sorted by."""
    said = run.summary or {}
    card = said.get("protocol", {})
    percent = {key: said.get(f"test_{key}") for key in ("accuracy", "accuracy_top5", "mean_per_class")}
    mark = "†" if card.get("marked") else ""
    step, memory = said.get("median_step_s"), said.get("peak_memory_mib")
    fields: list[tuple[str, Any]] = [
        (run.config["method"]["name"], run.config["method"]["name"]),
        (card.get("dataset", run.config["data"]["name"]),) * 2,
        (str(run.config["train"]["seed"]), run.config["train"]["seed"]),
        *((f"{100 * value:.1f}{mark}" if value is not None else "", value) for value in percent.values()),
        _number(said.get("test_calibration_error"), "{:.3f}"),
        _number(said.get("trainable_parameters"), "{:,}"),
        _number(memory, "{:,.0f}"),
        _number(None if step is None else 1000 * step, "{:,.0f}"),
    ]
    return {"id": f"run{number}", "name": run.name, "done": run.summary is not None, "fields": fields}


def _number(value: float | None, form: str) -> tuple[str, float | None]:
    return ("" if value is None else form.format(value)), value


def _run(number: int, run: RunFolder) -> dict[str, Any]:
    """What the page says of one run."""
    said = run.summary or {}
    card = said.get("protocol", {})
    ordered = {label: card[key] for key, label in CARD.items() if key in card}
    rest = {key: value for key, value in card.items() if key not in CARD}
    accuracies = {key: _series(run.metrics, key) for key in ("val_accuracy", "test_accuracy")}
    speeds = {"images per second": _series(run.metrics, "images_per_s")}
    waits = {"share of time spent waiting for images": _series(run.metrics, "data_wait")}
    memory = {"process": _series(run.metrics, "process_mib"), "GPU": _series(run.metrics, "gpu_memory_mib")}
    gpu = {"utilisation %": _series(run.metrics, "gpu_utilisation"), "watts": _series(run.metrics, "gpu_power_w"),
           "°C": _series(run.metrics, "gpu_temperature_c")}  # fmt: skip
    return {
        "id": f"run{number}",
        "name": run.name,
        "method": run.config["method"]["name"],
        "done": run.summary is not None,
        "steps": run.metrics[-1]["step"] + 1 if run.metrics else 0,
        "accuracy": said.get("test_accuracy"),
        "marked": card.get("marked", False),
        "card": ordered | {key.replace("_", " "): value for key, value in rest.items()},
        "loss": charts.lines({"loss": _series(run.metrics, "loss")}, "training loss"),
        "curve": charts.lines({k.replace("_", " "): v for k, v in accuracies.items()}, "accuracy, looks", top=1.0),
        "telemetry": [
            charts.lines(speeds, "images per second"),
            charts.lines(waits, "data wait", top=1.0),
            charts.lines(memory, "memory, MiB"),
            charts.lines(gpu, "GPU"),
        ],
        "outcome": _outcome(run),
        "mistakes": _mistakes(run.folder),
        "config": run.config_text,
        "attempts": run.attempts,
    }


def _series(metrics: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["step"] + 1, record[key]) for record in metrics if key in record]


def _outcome(run: RunFolder) -> dict[str, Any] | None:
    """Confusion and calibration on test; None for an unfinished run."""
    file = run.folder / "test_predictions.safetensors"
    if run.summary is None or not file.exists():
        return None
    said = read_tensors(file)
    label, predicted, confidence = (said[key].numpy() for key in ("label", "predicted", "confidence"))
    classes = run.summary["classes"]
    counts = charts.confusion(label, predicted, len(classes))
    off = [(int(counts[i, j]), i, j) for i, j in zip(*counts.nonzero(), strict=True) if i != j]
    pairs = [(classes[i], classes[j], n, int(counts[i].sum())) for n, i, j in sorted(off, reverse=True)[:PAIRS]]
    return {
        "classes": classes,
        "counts": counts.tolist() if len(classes) <= LABELLED else None,
        "picture": charts.heat(counts),
        "pairs": pairs,
        "reliability": charts.reliability(confidence, label == predicted),
        "calibration_error": run.summary["test_calibration_error"],
    }


def _mistakes(folder: Path) -> list[dict[str, Any]]:
    listed = folder / "mistakes" / "mistakes.json"
    if not listed.exists():
        return []
    said = _parsed(listed)
    return [m | {"data": base64.b64encode((listed.parent / m["file"]).read_bytes()).decode()} for m in said]
