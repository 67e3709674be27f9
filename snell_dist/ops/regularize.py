"""Dropout on the delta's input and drop path on its output, from values that are drawn once a call.

The mask is a function of a seed, so backward can make it again instead of keeping a dropped copy of x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from snell_dist.standing import kind


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed (0-d int64) from the device's default generator."""
    return torch.randint(0, 1 << 62, (), dtype=torch.int64, device=device)


def draw_path(samples: int, rate: float, like: Tensor) -> Tensor:
    """Drop path: a scale for each sample [samples], 0 (dropped) or 1/(1 - rate), float32."""
    keep = torch.rand(samples, device=like.device) >= rate
    return keep / (1 - rate)


def drop_paths(y: Tensor, groups: int, rate: float) -> Tensor:
    """Drop path of y [samples, ..., groups * out], drawn for each sample and group: as `groups` layers would."""
    each = [y.shape[0], *[1] * (y.dim() - 2)] if y.dim() > 1 else []
    fates = draw_path(math.prod(each) * groups, rate, y).to(y.dtype).view(*each, groups, 1)
    return (y.unflatten(-1, (groups, -1)) * fates).flatten(-2)


def keep_scale(seed: Tensor, shape: torch.Size, rate: float, dtype: torch.dtype) -> Tensor:
    """Dropout's mask for `shape`: 0 or 1/(1 - rate), the same for the same seed and device type.

    On the CPU a draw has 16 bits, four to a random word: a third of the time of torch's own dropout, and a rate within
    1/131072 of the one asked for.
    """
    if kind(seed.device) != "cpu":
        return _hashed_scale(seed, shape, rate, dtype)
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=seed.device)
    if not seed.is_meta:
        words.random_(-(1 << 63), None, generator=torch.Generator().manual_seed(int(seed)))
    draws = words.view(torch.int16)[: shape.numel()].view(shape)
    return (draws >= round(rate * (1 << 16)) - (1 << 15)).to(dtype).div_(1 - rate)


def _hashed_scale(seed: Tensor, shape: torch.Size, rate: float, dtype: torch.dtype) -> Tensor:
    """The same without the host reading the seed: a hash of seed and position (the mixing of SplitMix64)."""
    z = torch.arange(1, shape.numel() + 1, device=seed.device).mul_(-0x61C8864680B583EB).add_(seed)
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ _shift(z, shift)).mul_(factor)
    uniform = _shift(z ^ _shift(z, 31), 40)  # 24 bits
    return (uniform >= round(rate * (1 << 24))).view(shape).to(dtype).div_(1 - rate)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
