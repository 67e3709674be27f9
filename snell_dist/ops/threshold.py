"""The exact threshold: order statistics of |K| without a sort, without a limit on size, without the matrix.

Source: the released code takes torch.quantile(|K|, s) with linear interpolation; the paper's equation 5
takes the ceil(s n)-th smallest magnitude. Rank 0 is the smallest element; one NaN makes the threshold NaN.

`by_sorting` is the plain definition. `by_bracket` (CPU) guesses a narrow bracket from a sample or from the last
threshold, counts what lies below it, gathers the few inside and selects among them: exact, since the counts prove
that the bracket holds, and one cheap pass. `by_radix` needs no guess and no host sync (CUDA); its passes are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

DIGIT_BITS = 11
# Of all elements, so many at most are gathered at once; beyond (ties) the radix selection takes over.
GATHER_LIMIT = 1 / 4

# The share of all elements that the next call's bracket should hold.
NEXT_SHARE = 1 / 64

Tiles = Callable[[], Iterable[Tensor]]  # makes all tiles of |K| anew


@lru_cache(maxsize=4096)
def position(sparsity: float, count: int, interpolated: bool, dtype: torch.dtype) -> tuple[int, int, float]:
    """Ranks below and above the quantile of `count` elements, and the weight of the one above.

    torch.quantile rounds s to the elements' dtype and takes s (n - 1) in float64. So does this, at any count, and
    thresholds agree with the library's to the last bit where the library has an answer.
    """
    if not interpolated:  # 1e-6: 0.07 * 100 must not become rank 8
        rank = max(math.ceil(sparsity * count - 1e-6) - 1, 0)
        return rank, rank, 0.0
    place = float(np.float32(sparsity) if dtype == torch.float32 else sparsity) * (count - 1)
    below = min(math.floor(place), count - 1)
    return below, min(math.ceil(place), count - 1), place - below


def interpolate(below: Tensor, above: Tensor, weight: float) -> Tensor:
    """below + weight (above - below), rounded as torch.quantile rounds it."""
    # An infinite neighbour times weight 0 would be NaN.
    if weight == 0:
        return below.clone()
    return torch.lerp(below, above, torch.full_like(below, weight))


def by_sorting(magnitude: Tensor, sparsity: float, interpolated: bool) -> Tensor:
    """The threshold of a whole matrix [out, in] (0-d); NaN for an empty one or one with a NaN."""
    if magnitude.numel() == 0:
        return magnitude.new_full((), torch.nan)
    ordered = magnitude.flatten().sort().values
    low, high, weight = position(sparsity, len(ordered), interpolated, magnitude.dtype)
    threshold = interpolate(ordered[low], ordered[high], weight)
    return torch.where(ordered[-1].isnan(), ordered[-1], threshold)


def bracket_of(sample: Tensor, sparsity: float, margin: float, independent: int) -> tuple[float, float]:
    """Values that should enclose the quantile, from a sample of |K| worth so many independent elements.

    margin: half the width in standard deviations of the sample's quantile.
    """
    ordered = np.sort(sample.numpy())  # vectorised, unlike torch's
    spread = margin * math.sqrt(sparsity * (1 - sparsity) / independent)
    low = math.floor((sparsity - spread) * len(ordered))
    high = math.ceil((sparsity + spread) * len(ordered))
    bottom = float(ordered[low]) if low >= 0 else 0.0
    return bottom, float(ordered[high]) if high < len(ordered) else math.inf


def by_bracket(
    tiles: Tiles, count: int, sparsity: float, interpolated: bool, brackets: Iterator[tuple[float, float]],
    masks: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The threshold and half the width of a good bracket for the next time (0-d); None if no bracket held.

    Reads values on the host: for CPU tensors. masks: two bool tensors shaped as a tile.
    """
    for bottom, top in brackets:
        below, held, total, inside = 0, 0, 0.0, []
        for m in tiles():
            total += float(m.sum())  # NaN if any element is
            under, within = masks(m)
            below += int(torch.lt(m, bottom, out=under).count_nonzero())
            torch.le(m, top, out=within).logical_xor_(under)
            inside.append(m.flatten()[within.flatten()])
            held += len(inside[-1])
            if held > max(GATHER_LIMIT * count, 4096):
                break
        else:
            if math.isnan(total):
                return inside[0].new_full((), torch.nan), inside[0].new_zeros(())
            low, high, weight = position(sparsity, count, interpolated, inside[0].dtype)
            if below <= low and high < below + held:
                values = torch.from_numpy(np.sort(torch.cat(inside).numpy()))
                first, second = values[low - below], values[high - below]
                # As wide as would have gathered the share that is aimed at.
                width = (min(top, float(values[-1])) - bottom) / 2 * NEXT_SHARE * count / held
                return interpolate(first, second, weight), values.new_tensor(width)
    return None


def without_values(tiles: Tiles, masks: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """What `by_bracket` does with memory where the last bracket holds, of meta tensors: two numbers of no value."""
    inside = []
    for m in tiles():
        under, within = masks(m)
        torch.lt(m, 0, out=under)
        torch.le(m, 0, out=within).logical_xor_(under)
        places = m.new_empty(math.ceil(NEXT_SHARE * m.numel()), dtype=torch.int64)
        inside.append(m.flatten()[places])
    return torch.cat(inside).new_empty(2)


def by_partition(tiles: Tiles, count: int, sparsity: float, interpolated: bool, like: Tensor) -> Tensor:
    """The threshold (0-d) from all magnitudes at once: for CPU tensors of a size that may be held."""
    values = like.new_empty(count)
    filled = 0
    for m in tiles():
        values[filled : filled + m.numel()] = m.flatten()
        filled += m.numel()
    low, high, weight = position(sparsity, count, interpolated, like.dtype)
    values.numpy().partition([low, high, count - 1])
    return torch.where(values[-1].isnan(), values[-1], interpolate(values[low], values[high], weight))


def by_radix(tiles: Tiles, count: int, sparsity: float, interpolated: bool, like: Tensor) -> Tensor:
    """The threshold (0-d) by the bits of the magnitudes, 11 a pass, and one pass for the neighbour; no host sync."""
    bits, whole = (63, torch.int64) if like.dtype == torch.float64 else (31, torch.int32)
    low, high, weight = position(sparsity, count, interpolated, like.dtype)
    rank = torch.full((), low, dtype=torch.int64, device=like.device)  # within the elements that share `prefix`
    prefix = torch.zeros((), dtype=whole, device=like.device)
    left = bits
    while left:
        take = min(DIGIT_BITS, left)
        seen = torch.zeros((1 << take) + 1, dtype=torch.int64, device=like.device)
        for m in tiles():
            pattern = m.view(whole).flatten()
            digit = (pattern >> (left - take)) & ((1 << take) - 1)
            # Elements outside the prefix go to a bin of their own.
            digit = torch.where(_above(pattern, left, bits) == prefix, digit, 1 << take).long()
            seen.scatter_add_(0, digit, torch.ones_like(digit))
        upto = seen[:-1].cumsum(0)
        found = torch.searchsorted(upto, rank, right=True)
        # (take: an index in brackets would be read on the host)
        rank = rank - torch.where(found > 0, upto.take((found - 1).clamp_min(0)), 0)
        prefix = (prefix << take) | found.to(whole)
        left = 0 if like.is_meta else left - take  # there one pass shows what each of them takes
    first = prefix.view(like.dtype)
    largest = torch.zeros_like(first)
    second = torch.full_like(first, torch.inf)
    upto_first = torch.zeros_like(rank)
    for m in tiles():
        upto_first += (m <= first).sum()
        second = torch.minimum(second, torch.where(m > first, m, torch.inf).amin())
        largest = torch.maximum(largest, m.amax())  # carries a NaN along
    second = torch.where(upto_first > high, first, second)
    return torch.where(largest.isnan(), largest, interpolate(first, second, weight))


def _above(pattern: Tensor, left: int, bits: int) -> Tensor:
    """The bits of `pattern` above the `left` lowest (a shift by the full width is not defined)."""
    return torch.zeros_like(pattern) if left == bits else pattern >> left
