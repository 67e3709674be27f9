"""The adapter file: what a run trained and all that its base lacks, in one small safetensors file, to take away."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snell_dist.config import UserError
from snell_dist.tensor_files import read_metadata, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = "adapter.safetensors"
FORMAT = "snell_dist adapter 1"


@dataclass(frozen=True)
class Belongs:
    """What trained tensors belong to."""

    base: str
    base_sha256: str  # see `anatomy.fingerprint`
    method: Mapping[str, Any]
    classes: list[str]


def save(file: Path, weights: Mapping[str, Tensor], belongs: Belongs) -> None:
    metadata = {
        "format": FORMAT,
        "base": belongs.base,
        "base_sha256": belongs.base_sha256,
        "method": json.dumps(belongs.method, separators=(",", ":")),
        "classes": json.dumps(belongs.classes),
    }
    write_tensors(file, weights, metadata)


def load(file: Path, mine: Iterable[tuple[str, Tensor]], base_sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter file, for a model that has `mine` to be filled.

    Raises UserError where the file is damaged, is not an adapter, fits another model, or (with
    `base_sha256`) was trained on other base weights.
    """
    tensors, metadata = read_tensors(file), read_metadata(file)
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{file}: not an adapter file of this version (format {metadata.get('format')!r}, not {FORMAT!r})"
        )
    if base_sha256 is not None and metadata["base_sha256"] != base_sha256:
        theirs = f"{metadata['base']} with weights {metadata['base_sha256'][:12]}"
        raise UserError(f"{file}: was trained on {theirs}, not {base_sha256[:12]}")
    shapes = {name: tensor.shape for name, tensor in mine}
    for name, tensor in tensors.items():
        if shapes.get(name) != tensor.shape:
            raise UserError(
                f"{file}: {name} {list(tensor.shape)} does not fit this model: adapt it with {metadata['method']}"
            )
    return tensors


def fitting(source: str, tensors: Mapping[str, Tensor], mine: Iterable[tuple[str, Tensor]]) -> Mapping[str, Tensor]:
    """The tensors, which are all that a model has to be filled, in its shapes. UserError where they are not."""
    shapes = {name: tensor.shape for name, tensor in mine}
    for name in shapes.keys() ^ tensors.keys():
        said = f"lacks {name}, which trains here" if name in shapes else f"has {name}, which does not train here"
        raise UserError(f"{source}: {said}: are backbone and method.also_train as they were there?")
    for name, tensor in tensors.items():
        if shapes[name] != tensor.shape:
            fits = f"{list(tensor.shape)} does not fit this model's {list(shapes[name])}"
            raise UserError(f"{source}: {name} {fits}: is it another base, or another number of classes?")
    return tensors
