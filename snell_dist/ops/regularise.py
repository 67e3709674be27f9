"""Dropout on the delta's input and drop path on its output, as functions of a seed.

Backward draws them again from the seed, so no mask and no dropped copy of x is kept between the passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 2**16


def draw_seed() -> Tensor:
    """A 0-d int64 tensor on the CPU, drawn from torch's default generator; reading it never waits for a device."""
    return torch.randint(2**62, ())


def dropout_mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """A mask like x: 0 where dropped, else 1 / keep. q, k and v of a fused layer share it, as they share x.

    On the CPU each random 64-bit word serves four entries, so `dropout` is met to 1 / 2**16; the scale is that
    of the fraction met.
    """
    if x.device.type == "cpu":
        generator = torch.Generator().manual_seed(int(seed))
        dropped = round(dropout * LEVELS)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
        kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - LEVELS // 2
        return kept.to(x.dtype).mul_(LEVELS / (LEVELS - dropped))
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.empty_like(x).bernoulli_(1 - dropout, generator=generator).mul_(1 / (1 - dropout))


def kept_samples(samples: int, drop_path: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of samples whose delta stays (to be scaled by 1 / keep) and of those that lose it; on the CPU."""
    generator = torch.Generator().manual_seed(int(seed) ^ 1)
    kept = torch.rand(samples, generator=generator) >= drop_path
    return kept.nonzero().flatten(), kept.logical_not().nonzero().flatten()
