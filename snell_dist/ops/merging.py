"""Tiles of K become thresholds, and tiles of the merged weight or of the delta."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from functools import partial

import torch
from torch import Tensor

from snell_dist.ops.plan import Plan
from snell_dist.ops.threshold import Tiles, bracket_of, by_bracket, by_partition, by_radix, without_values
from snell_dist.ops.tiles import Block, Matrix, Tile
from snell_dist.standing import kind

# Half widths of the brackets that are tried, in standard deviations of the sample's quantile.
MARGINS = 6.0, 20.0


def thresholds(
    matrix: Matrix, hint: Tensor | None, magnitudes: Callable[[range], Iterator[Tensor]] | None = None
) -> Tensor:
    """The threshold of each group, and half the width of a bracket for the next call: [2, groups].

    hint: an earlier result for the same layer; it changes the time, never the result.
    magnitudes: makes |K| of some groups tile by tile, where the caller has a better way than building it anew.
    """
    plan = matrix.plan
    found = matrix.like.new_zeros(2, plan.groups)
    for part, (groups, sparsity) in enumerate(zip(plan.parts, plan.sparsities, strict=True)):
        if not plan.dense(sparsity):
            last = None if hint is None else hint[:, part]
            tiles = partial(magnitudes or matrix.magnitudes, groups)
            found[:, groups.start : groups.stop] = _threshold(matrix, tiles, groups, sparsity, last).unsqueeze(1)
    return found


def _threshold(matrix: Matrix, tiles: Tiles, groups: range, sparsity: float, last: Tensor | None) -> Tensor:
    count = matrix.group_rows * matrix.in_features * len(groups)
    like = matrix.like
    if count == 0:
        return like.new_full((2,), torch.nan)

    def brackets() -> Iterator[tuple[float, float]]:
        if last is not None:
            middle, width = last.tolist()
            if width > 0:
                yield max(middle - width, 0.0), middle + width
        sample, independent = matrix.sample(groups)
        for margin in MARGINS:
            yield bracket_of(sample, sparsity, margin, independent)

    interpolated = matrix.plan.interpolated
    if kind(like.device) == "cpu":
        if like.is_meta:
            return without_values(tiles, matrix.masks)
        result = by_bracket(tiles, count, sparsity, interpolated, brackets(), matrix.masks)
        if result is not None:
            return torch.stack(result)
        if not matrix.plan.workspace:
            value = by_partition(tiles, count, sparsity, interpolated, like)
            return torch.stack([value, torch.zeros_like(value)])
    value = by_radix(tiles, count, sparsity, interpolated, like)
    return torch.stack([value, torch.zeros_like(value)])


def factor_(magnitude: Tensor, threshold: Tensor, sparsify: str) -> Tensor:
    """sparsify.factor in place of the magnitudes. NaN stays, and a NaN threshold removes nothing."""
    if sparsify == "paper":
        return magnitude.sub_(threshold).clamp_min_(0)
    if kind(magnitude.device) == "cpu":
        # One pass; a host read, free here.
        torch.threshold_(magnitude, 0.0 if magnitude.is_meta else float(threshold), 0)
    else:
        magnitude.masked_fill_(magnitude <= threshold, 0)
    return magnitude if sparsify == "released" else magnitude.sign_()


def factor_of(matrix: Matrix, tile: Tile, k: Tensor, found: Tensor | None) -> Tensor | None:
    """f of a tile, in room of its own; None for 1."""
    if found is None or matrix.plan.dense(matrix.plan.sparsity_of(tile.group)):
        return None
    return factor_(matrix.magnitude(tile, k), found[tile.group], matrix.plan.sparsify)


def merge(target: Tensor, k: Tensor, factor: Tensor | None, base: Tensor | None, scale: float) -> None:
    """target = base + scale k factor; k may be overwritten and may be the target."""
    if factor is not None and base is not None and base.dtype == k.dtype == target.dtype:
        torch.addcmul(base, k, factor, value=scale, out=target)
        return
    delta = k if factor is None else k.mul_(factor)
    if scale != 1:
        delta.mul_(scale)
    target.copy_(delta if base is None else delta.add_(base))


def fill(
    out: Tensor, block: Block, matrix: Matrix, found: Tensor | None, weight: Tensor | None, scale: float,
    built: Container[tuple[int, int]] = (),
) -> None:  # fmt: skip
    """Writes weight + scale delta of a block (or delta alone); `built`: keys of tiles whose K is there already."""
    for tile in matrix.tiles(block):
        target = tile.of(out, block)
        k = target if tile.key in built else matrix.build(tile)
        base = None if weight is None else weight[tile.rows, tile.cols]
        merge(target, k, factor_of(matrix, tile, k, found), base, scale)


def store_and_look(
    out: Tensor, blocks: list[Block], matrix: Matrix, hint: Tensor | None
) -> tuple[Tensor, set[tuple[int, int]]]:
    """Thresholds; K of the first block stays in `out`, so that it is built once."""
    built: set[tuple[int, int]] = set()

    def magnitudes(groups: range) -> Iterator[Tensor]:
        for block in blocks:
            for tile in matrix.tiles(block, groups):
                if block is not blocks[0]:
                    yield matrix.magnitude(tile, matrix.build(tile))
                    continue
                target = tile.of(out, block)
                if tile.key not in built:
                    matrix.build(tile, out=target)
                    built.add(tile.key)
                yield matrix.magnitude(tile, target)

    return thresholds(matrix, hint, magnitudes), built


def merge_delta(a: Tensor, b: Tensor, params: Tensor | None, plan: Plan) -> Tensor:
    """delta [out, in], tile by tile."""
    matrix = Matrix(a, b, params, plan)
    delta = b.new_empty(len(b), len(a))
    whole, found, built = Block(slice(0, len(b)), slice(0, len(a))), None, set[tuple[int, int]]()
    if not plan.all_dense:
        found, built = store_and_look(delta, [whole], matrix, None)
    fill(delta, whole, matrix, None if found is None else found[0], None, 1.0, built)
    return delta
