"""What tells the base of an adapter from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from snell_dist.peft.config import features

SAMPLES = 64  # entries of a weight that its fingerprint looks at


def fingerprint(layers: Mapping[str, nn.Module]) -> str:
    """What tells the weights of these layers from others: a hash of names and shapes, and one of sampled entries.

    It sees another architecture, other pretrained weights, or weights that were trained or merged since: 64 entries a
    layer are read, so a change of a few entries may stay unseen, as does one of other layers. Entries count in
    bfloat16, so that a base agrees with itself in float32 and bfloat16; float16, packed, sharded and meta ones do not.
    """
    shapes, entries = hashlib.sha256(), hashlib.sha256()
    countable = True
    for name, layer in sorted(layers.items()):
        shapes.update(f"{name} {features(name, layer)}".encode())
        weight = layer.weight
        assert isinstance(weight, Tensor)
        countable &= type(weight) in (nn.Parameter, Tensor) and not weight.is_meta and weight.numel() > 0
        countable &= weight.dtype in (torch.float32, torch.float64, torch.bfloat16)
        if countable:
            places = (
                torch.arange(SAMPLES, device=weight.device) * 2654435761 % weight.numel()
            )  # spread by Knuth's factor
            sample = weight.detach().take(places).float().bfloat16()
            entries.update(bytes(sample.view(torch.uint8).tolist()))
    return f"{shapes.hexdigest()[:16]}-{entries.hexdigest()[:16] if countable else ''}"


def difference(one: str, two: str) -> str:
    """In what two fingerprints differ; nothing where they agree as far as both say."""
    (shapes, entries), (their_shapes, theirs) = one.split("-", 1), two.split("-", 1)
    if shapes != their_shapes:
        return "names or shapes"
    return "weights" if entries and theirs and entries != theirs else ""
