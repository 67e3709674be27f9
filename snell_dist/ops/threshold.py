"""Which order statistics a sparsity asks for, and the plain way to find them.

Source: the released code takes torch.quantile(|K|, s) with linear interpolation; the paper's equation 5
takes the ceil(s n)-th smallest magnitude. Rank 0 is the smallest element; NaN sorts last.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

# torch.quantile's limit, and the largest count for which every float32 rank is an integer that exists.
LIBRARY_LIMIT = 1 << 24


@lru_cache(maxsize=4096)
def position(sparsity: float, count: int, interpolate: bool, dtype: torch.dtype) -> tuple[int, int, float]:
    """Ranks below and above the quantile of `count` elements, and the weight of the one above.

    Up to the library's limit the position s (n - 1) is rounded in `dtype` as torch.quantile rounds it, so that
    thresholds agree to the last bit; beyond, float32 could not name every rank and float64 is used.
    """
    if not interpolate:  # 1e-6: 0.07 * 100 must not become rank 8
        rank = max(math.ceil(sparsity * count - 1e-6) - 1, 0)
        return rank, rank, 0.0
    exact = dtype if count <= LIBRARY_LIMIT else torch.float64
    place = (torch.tensor(sparsity, dtype=exact) * (count - 1)).item()
    below = math.floor(place)
    return below, min(math.ceil(place), count - 1), place - below


def interpolate(below: Tensor, above: Tensor, weight: float) -> Tensor:
    """below + weight (above - below), rounded as torch.quantile rounds it."""
    return torch.lerp(below, above, torch.tensor(weight, dtype=below.dtype, device=below.device))


def by_sorting(magnitude: Tensor, sparsity: float, interpolated: bool) -> Tensor:
    """The threshold of a whole matrix [out, in] (0-d); NaN if any element is NaN."""
    ordered = magnitude.flatten().sort().values
    low, high, weight = position(sparsity, len(ordered), interpolated, magnitude.dtype)
    return interpolate(ordered[low], ordered[high], weight) + 0 * ordered[-1]
