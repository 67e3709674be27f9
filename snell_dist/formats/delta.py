"""The sparse delta alone, to be added to a base that is there already; see delta.py for the file and its use."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snell_dist import dist, log, weights
from snell_dist.config import Plugin, UserError
from snell_dist.config import check as check_section
from snell_dist.delta import DELTA

if TYPE_CHECKING:
    import torch
    from torch import nn

    from snell_dist.finished import Finished
    from snell_dist.formats import Served

ABOUT = "one safetensors file: the entries that a sparse method changed, for a base that stays in memory"
LIBRARY = "snell_dist"
DENSE_BYTES = 4  # of an entry of the weight itself


def check(run: Finished) -> None:
    """What lies densely in every entry, or in modules that the base lacks, is no sparse delta."""
    config = run.config
    name, dump = config.method.name, config.method.model_dump()
    adapts = "targets" in dump
    if not config.method.mergeable or name == "full" or (adapts and not _sparsity(run)):
        how = {"full": "trains every weight"}.get(name, "changes every entry" if adapts else "adds modules")
        raise UserError(f"--format delta: {run.folder}: method {name} {how}: choose timm, open_clip or peft")
    if config.backbone.name == "clip" and config.task.name != "contrastive":
        raise UserError(f"--format delta: {run.folder}: its classifier has no place in open_clip's model: choose timm")
    if config.precision.frozen != "float32":
        rounded = f"belongs to a base that was rounded to {config.precision.frozen}"
        raise UserError(f"--format delta: {run.folder}: {rounded}: choose timm or open_clip")


def _sparsity(run: Finished) -> float:
    said = run.config.method.model_dump()
    return max(said.get("sparsity", 0.0), (said.get("allocator") or {}).get("target_sparsity", 0.0))


def write(run: Finished, folder: Path, dtype: torch.dtype) -> None:
    from snell_dist import delta
    from snell_dist.delta import Delta, Entries
    from snell_dist.finished import Folded

    family = run.config.backbone
    folded = Folded(run)
    entries = {family.library_name(name): Entries.of(tensor) for name, tensor in folded.deltas()}
    total = sum(e.numel for e in entries.values())
    if total and sum(e.nbytes for e in entries.values()) >= total * DENSE_BYTES:
        kept = sum(len(e.values) for e in entries.values()) / total
        raise UserError(f"--format delta: {run.folder}: {kept:.0%} of the entries change: choose timm or open_clip")
    whole = {family.library_name(name): run.tensors[name] for name in folded.shapes if name in run.tensors}
    renamed = {theirs: name for name in folded.shapes if (theirs := family.library_name(name)) != name}
    about = {
        "preprocessing": asdict(run.preprocessing),
        "backbone": family.model_copy(update={"weights": run.weights}).model_dump(),
        "task": run.config.task.model_dump(),
        "seed": run.config.train.seed,
    }
    made = Delta(
        entries=entries,
        whole=whole,
        base=run.summary["base"],
        base_sha256=run.base_sha256,
        head=run.empty().head,
        method=run.config.method.model_dump(),
        classes=run.classes,
        renamed=renamed,
        about=about,
    )
    delta.write(folder / DELTA, made, dtype)
    bitmaps = sum(e.as_bitmap for e in entries.values())
    share = f"{made.count / total:.1%} of {total:,} entries in {len(entries)} weights" if total else "no weight"
    size = (folder / DELTA).stat().st_size / 2**20
    stored = f"as a bitmap of {bitmaps} (smaller above 1 in 32), as indices of {len(entries) - bitmaps}"
    log.info(f"delta: {share}, {size:.2f} MiB; positions are stored {stored}; besides, {len(whole)} whole tensors")


def reload(run: Finished, folder: Path) -> Served:
    return load(folder)


def usage(run: Finished) -> str:
    return """\
import snell_dist

model = snell_dist.load(".")  # the base, from where the run had it, with the delta on it
print(model.predict("picture.png", top=3))
# on a plain model of yours that holds the same base, for a while:
#     with snell_dist.apply_delta(yours, "delta.safetensors"): ..."""


def holds(folder: Path) -> bool:
    return (folder / DELTA).is_file()


def load(folder: Path) -> Served:
    """The base, from where the run had it, as its library makes it, with the delta on it."""
    from snell_dist import delta
    from snell_dist.data import Preprocessing, _transforms
    from snell_dist.formats import Served

    made = delta.read(folder / DELTA)
    said: Any = made.about
    family, task = _section("backbones", said["backbone"]), _section("tasks", said["task"])
    if family.weights and weights.is_gone(family.weights):
        raise UserError(f"{folder / DELTA}: its base {family.weights} is not where it was (seen from {Path.cwd()})")
    dist.seed_everything(said["seed"])  # of what no file fills
    built = task.build(family, made.classes)
    backbone = replace(built, model=_plain(family, built.model, len(made.classes)))
    delta.apply_delta(backbone.model, made)
    preprocessing = Preprocessing(**said["preprocessing"])
    return Served(
        logits=task.logits(backbone, made.classes),
        prepare=_transforms.Prepare(preprocessing.channels, _transforms.plain(preprocessing)),
        classes=made.classes,
        image_shape=backbone.image_shape,
        about=f"{made.base} and the delta {folder / DELTA}",
        model=backbone.model,
    )


def _section(folder: str, said: dict[str, Any]) -> Any:
    return check_section(said, Plugin(folder).find(said["name"]))


def _plain(family: Any, ours: nn.Module, classes: int) -> nn.Module:
    """The library's own model with the same numbers."""
    theirs = family.library_model(classes).eval()
    theirs.load_state_dict({family.library_name(name): tensor for name, tensor in ours.state_dict().items()})
    return theirs
