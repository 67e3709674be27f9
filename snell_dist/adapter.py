"""The adapter file: what a run trained and all that its base lacks, in one small safetensors file, to take away."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from snell_dist.config import UserError, first_line
from snell_dist.files import sync

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


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. UserError where it is missing or damaged."""
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); was its copy cut off?") from None


def read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or absent, on the disk when this returns. UserError where it cannot be written."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
        sync(temporary)
        temporary.replace(file)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written: {first_line(error)}") from None
