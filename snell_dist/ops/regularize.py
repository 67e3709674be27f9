"""Dropout on the delta's input and drop path on its output, from values that are drawn once a call.

The mask is a function of a seed, so backward can make it again instead of keeping a dropped copy of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 1 << 16


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed (0-d int64) from the device's default generator."""
    return torch.randint(0, 1 << 62, (), dtype=torch.int64, device=device)


def draw_path(samples: int, rate: float, like: Tensor) -> Tensor:
    """Drop path: a scale for each sample [samples], 0 (dropped) or 1/(1 - rate), float32."""
    keep = torch.rand(samples, device=like.device) >= rate
    return keep / (1 - rate)


def keep_scale(seed: Tensor, shape: torch.Size, rate: float, dtype: torch.dtype) -> Tensor:
    """Dropout's mask for `shape`: 0 or 1 / keep, the same for the same seed.

    On the CPU a random 64-bit word serves four elements, so the rate is met to 1 / 2**16; the scale is that of the
    rate that was met.
    """
    generator = torch.Generator(seed.device).manual_seed(int(seed))
    if seed.device.type != "cpu":
        return (
            torch.empty(shape, dtype=dtype, device=seed.device).bernoulli_(1 - rate, generator=generator).div_(1 - rate)
        )
    dropped, count = round(rate * LEVELS), shape.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    kept = words.view(torch.int16)[:count] >= dropped - LEVELS // 2
    return kept.view(shape).to(dtype).mul_(LEVELS / (LEVELS - dropped))
