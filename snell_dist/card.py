"""The model card of an exported run: README.md with the hub's front matter, all of it from what the run recorded.

What is not known stays out: a licence that the base's library does not name, a base that is only a file. Names of
machines and folders stay out, too, since a card is made to be published.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from snell_dist import run_folder, weights
from snell_dist.backbones import Origin
from snell_dist.files import write_atomic
from snell_dist.finished import Finished

CARD = "README.md"
NAMED = 30  # classes that the text names
SETTINGS = "backbone", "method", "task", "optim", "precision", "protocol"
PLACES = ("weights",)  # of settings: where things are, and not what was done
METRICS = {
    "test_accuracy": "accuracy",
    "test_accuracy_top5": "accuracy, top 5",
    "test_mean_per_class": "mean accuracy of the classes",
    "test_calibration_error": "expected calibration error",
    "test_loss": "cross-entropy in nats",
    "val_accuracy": "accuracy on val",
}
DATA = {
    "dataset": "images",
    "split": "division",
    "train_images": "to train on",
    "val_images": "to choose by (val)",
    "test_images": "to report on (test)",
    "resize": "resized",
    "normalisation": "normalised",
    "augmentation": "augmented",
    "data_sha256": "SHA-256 of names and labels",
}
TASKS = {
    "classify": ("image-classification", "Image classification"),
    "contrastive": ("zero-shot-image-classification", "Zero-shot image classification"),
}


def write(folder: Path, run: Finished, name: str, library: str, usage: str, proof: str) -> None:
    """Puts the card of a run into the folder with its files of a format.

    library: as the hub calls it; usage: how it opens the folder, in Python; proof: how the files were checked.
    """
    front = metadata(run, library)
    text = "\n".join(_text(run, name, front, usage, proof))
    write_atomic(folder / CARD, str(ModelCard(f"---\n{front.to_yaml()}\n---\n\n{text}")))


def origin(run: Finished) -> Origin:
    """Of the base's weights, where its library or the hub knows them by a name."""
    said, section = run.summary["base_weights"], run.config.backbone
    if said is None:
        return Origin()
    if said.startswith("hub:"):
        return Origin(hub=said.removeprefix("hub:").partition("@")[0])
    return Origin() if weights.is_source(said) else section.origin(said)


def metadata(run: Finished, library: str) -> ModelCardData:
    """The front matter, in the hub's own form."""
    base, protocol = origin(run), run.summary["protocol"]
    pipeline, task = TASKS[run.config.task.name]
    result = EvalResult(
        task_type=pipeline,
        task_name=task,
        dataset_type=run.config.data.name,
        dataset_name=protocol["dataset"],
        dataset_split="test",
        metric_type="accuracy",
        metric_name="accuracy (chosen on the test images)" if protocol["marked"] else "accuracy",
        metric_value=round(run.summary["test_accuracy"], 4),
    )
    return ModelCardData(
        base_model=base.hub,
        license=base.license,
        library_name=library,
        pipeline_tag=pipeline,
        tags=["snell", f"method:{run.config.method.name}", "parameter-efficient-fine-tuning"],
        metrics=["accuracy"],
        model_name=title(run),
        eval_results=[result],
    )


def title(run: Finished) -> str:
    return f"{run.summary['base']}, {run.config.method.name}, {run.summary['protocol']['dataset']}"


def _text(run: Finished, name: str, front: ModelCardData, usage: str, proof: str) -> Iterable[str]:
    summary, protocol = run.summary, run.summary["protocol"]
    yield f"# {_inline(title(run))}"
    yield ""
    yield f"{_inline(summary['base'])}, adapted by {summary['method']} with snell_dist to {len(run.classes)} classes:"
    yield f"{_classes(run.classes)}."
    yield from _section("Use")
    yield "In this folder:"
    yield from ("", "```python", usage, "```")
    yield from _section("Base and method")
    yield from _table(_base(run, front))
    yield from ("", "```yaml", yaml.safe_dump(settings(run), sort_keys=False).rstrip(), "```")
    yield from _section("Result")
    yield from _table((label, f"{summary[key]:.4f}") for key, label in METRICS.items() if summary.get(key) is not None)
    yield ""
    looks = f"{protocol['test_looks']} look{'s' if protocol['test_looks'] > 1 else ''} at the test images"
    yield f"Weights: {protocol['chosen']} (protocol `{protocol['select']}`); {looks}; seed {protocol['seed']}."
    if protocol["marked"]:
        yield "**These weights were chosen on the test images**, as the released code of SNELL does: the accuracy is"
        yield "higher than what new images will see."
    yield from _section("Data")
    yield from _table((label, protocol[key]) for key, label in DATA.items() if protocol.get(key) is not None)
    yield from _section("Memory and time of training")
    yield from _table(_costs(run))
    yield from _section("Environment")
    yield from _table(_environment(run))
    yield from _section("These files")
    yield f"Format {name} of `snell export`. {proof}"
    yield from _section("Limits")
    yield f"It knows these {len(run.classes)} classes and gives one of them for every picture, whatever it shows."
    yield "Nothing is known of it beyond the images above: not of other sources, cameras or times, and not of fairness"
    yield "between groups of people. What limits the base limits it, too."
    yield ""


def _section(name: str) -> Iterable[str]:
    return "", f"## {name}", ""


def _table(rows: Iterable[tuple[str, Any]]) -> Iterable[str]:
    yield "| | |"
    yield "| --- | --- |"
    for label, value in rows:
        yield f"| {label} | {_inline(value)} |"


def _inline(value: Any) -> str:
    """Names come from folders and files of the user: they must neither end a cell or a line nor begin markup."""
    said = f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join("".join(f"\\{c}" if c in "|<>`*[]\\" else c for c in said).split())


def _classes(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(_inline, names[:NAMED])) + more


def _base(run: Finished, front: ModelCardData) -> Iterable[tuple[str, Any]]:
    summary, said = run.summary, run.summary["base_weights"]
    yield "model", summary["base"]
    where = front.base_model or (said if said and not weights.is_source(said) else "a file" if said else "random")
    yield "weights", where
    yield "their SHA-256 (`snell_dist`'s fingerprint)", summary["base_sha256"]
    yield "their licence", front.license or "not known here; it holds for these weights as well"
    yield "trained parameters", f"{summary['trainable_parameters']:,} of {summary['parameters']:,}"


def settings(run: Finished) -> dict[str, Any]:
    """What was done, by section of the configuration, without the places of files."""
    whole = run.config.model_dump()
    return {name: {k: v for k, v in whole[name].items() if k not in PLACES and v is not None} for name in SETTINGS}


def _costs(run: Finished) -> Iterable[tuple[str, Any]]:
    summary, attempts = run.summary, run_folder.attempts(run.folder)
    on = f" on {attempts[-1]['device']}" if attempts else ""
    if summary.get("peak_memory_mib"):
        yield f"peak memory of tensors in a training step{on}, of a rank", f"{summary['peak_memory_mib']:,.1f} MiB"
    if summary.get("median_step_s"):
        yield "median step", f"{1e3 * summary['median_step_s']:,.1f} ms"
    protocol = summary["protocol"]
    yield "steps", f"{protocol['steps']:,} ({protocol['epochs']:.1f} epochs) of {protocol['batch_size']} images"
    yield "processes", f"{protocol['world_size']}, engine {run.config.engine.name}"


def _environment(run: Finished) -> Iterable[tuple[str, Any]]:
    attempts = run_folder.attempts(run.folder)
    if not attempts:
        return
    last = attempts[-1]
    yield "started", attempts[0]["started"]
    if len(attempts) > 1:
        yield "starts", len(attempts)
    yield "device", last["device"]
    yield "platform", last["platform"]
    yield "Python", last["python"]
    yield "packages", ", ".join(f"{name} {number}" for name, number in last["versions"].items() if number)
    if last.get("git"):
        yield "commit", last["git"]
