"""Backbones: pretrained vision models. One file a family, found by its name.

A family is a config section that builds a `Backbone`: the model, and what the rest of the harness
needs to know of it without knowing the family.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snell_dist.config import Section, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Backbone:
    """A built model. `fingerprint` identifies its weights, the classifier apart, before anything is adapted."""

    name: str
    model: nn.Module
    blocks: list[nn.Module]  # in order: the unit of activation checkpointing and of sharding
    targets: dict[str, int]  # linear layers to adapt, each with its number of row groups (fused qkv: 3)
    besides: list[str]  # what the paper trains besides the factors in this family
    image_shape: tuple[int, int, int]  # channels, height, width
    fingerprint: str


class BackboneSection(Section):
    """What every family says."""

    name: str
    weights: str | None = None

    def build(self, classes: int) -> Backbone:
        """The model with a new classifier for `classes` classes. UserError where weights cannot be had."""
        raise NotImplementedError


def load_weights(model: nn.Module, file: Path, new: Iterable[str] = ("head",)) -> None:
    """Copies a safetensors file into the model, in place; parameters under `new` keep their initialisation.

    Raises UserError where the file is missing, damaged, or does not hold this model's weights.
    """
    state = read_tensors(file)
    wanted = {name: t for name, t in model.state_dict().items() if name.partition(".")[0] not in set(new)}
    missing = [name for name in wanted if name not in state]
    shaped = [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
    if missing or shaped:
        name = (shaped or missing)[0]
        found = f"has {list(state[name].shape)} for" if name in state else "lacks"
        raise UserError(
            f"backbone.weights: {file} {found} {name} {list(wanted[name].shape)}"
            f" ({len(missing)} missing, {len(shaped)} of another shape, of {len(wanted)}): is it another model's file?"
        )
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. UserError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); was its copy cut off?") from None


def fingerprint(model: nn.Module, without: Iterable[str] = ("head",)) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state dict, in its order."""
    import torch

    digest, skipped = hashlib.sha256(), set(without)
    for name, tensor in model.state_dict().items():
        if name.partition(".")[0] not in skipped:
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
