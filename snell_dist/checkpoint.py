"""Two kinds of file. A training checkpoint resumes a run; an adapter file is taken away from it.

A training checkpoint holds what trains and its optimizer state, keyed `model/<name>` and
`optimizer/<name>/<state>`, whatever engine wrote it. The learning rate, the randomness and the place in
the data are functions of the step. It appears under its name by one rename, so it is whole or absent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from snell_dist import dist
from snell_dist.config import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snell_dist.methods import Method

ADAPTER = "adapter.safetensors"
FORMAT = "snell_dist adapter 1"


def save(folder: Path, state: dict[str, Tensor], step: int, keep: int) -> None:
    """Writes `checkpoints/step_N`, N steps done, then removes all but the newest `keep`."""
    if dist.rank() == 0:
        parent = folder / "checkpoints"
        temporary, final = parent / f".tmp_step_{step:08d}", parent / f"step_{step:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_tensors(temporary / "state.safetensors", state, {"step": str(step)})
        _sync(temporary)
        if final.exists():  # the same step, written again after a resume from before it
            shutil.rmtree(final)
        temporary.replace(final)
        _sync(parent)
        for old in _finished(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def newest(folder: Path) -> tuple[int, dict[str, Tensor]]:
    """Steps done and the state after them, of the newest checkpoint; (0, {}) where there is none."""
    done = _finished(folder)
    if not done:
        return 0, {}
    return int(done[-1].name.removeprefix("step_")), read_tensors(done[-1] / "state.safetensors")


@dataclass(frozen=True)
class Belongs:
    """What an adapter file belongs to."""

    base: str
    base_sha256: str
    method: Method
    classes: list[str]


def save_adapter(file: Path, model: nn.Module, names: Iterable[str], belongs: Belongs) -> None:
    """The named tensors, which are all that the base lacks, and what they belong to."""
    state = model.state_dict()
    metadata = {
        "format": FORMAT,
        "base": belongs.base,
        "base_sha256": belongs.base_sha256,
        "method": belongs.method.model_dump_json(),
        "classes": json.dumps(belongs.classes),
    }
    write_tensors(file, {name: state[name] for name in names}, metadata)


def load_adapter(file: Path, model: nn.Module, base_sha256: str | None = None) -> None:
    """Copies an adapter file into a model that the same method has adapted, in place.

    Raises UserError where the file is damaged, is not an adapter, fits another model, or (with
    `base_sha256`, see `anatomy.fingerprint`) was trained on other base weights.
    """
    tensors, metadata = read_tensors(file), read_metadata(file)
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{file}: not an adapter file of this version (format {metadata.get('format')!r}, not {FORMAT!r})"
        )
    if base_sha256 is not None and metadata["base_sha256"] != base_sha256:
        theirs = f"{metadata['base']} with weights {metadata['base_sha256'][:12]}"
        raise UserError(f"{file}: was trained on {theirs}, not {base_sha256[:12]}")
    mine = model.state_dict()
    for name, tensor in tensors.items():
        if name not in mine or mine[name].shape != tensor.shape:
            raise UserError(
                f"{file}: {name} {list(tensor.shape)} does not fit this model: adapt it with {metadata['method']}"
            )
    model.load_state_dict(tensors, strict=False)


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


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file, whole or absent, on the disk when this returns."""
    temporary = file.with_name(f".{file.name}.tmp")
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)
    _sync(temporary)
    temporary.replace(file)


def _finished(folder: Path) -> list[Path]:
    found = (folder / "checkpoints").glob("step_*")
    return sorted(p for p in found if re.fullmatch(r"step_\d{8}", p.name))


def _sync(path: Path) -> None:
    """Flushes a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
