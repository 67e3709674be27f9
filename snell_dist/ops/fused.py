"""Forward and backward of the adapted layer over tiles of its merged matrix; no autograd here (library.py has it).

    merged     W = W0 + scale K f        y = x W^T,  dx = dy W                three dense products a step
    separate   y = x W0^T + (x S) (K f)^T,  dx = dy W0 + S (dy K f)           five; S: dropout's mask times drop path
    both       G = dy^T (x S), dK = G f -> da, db by the kernel's thin products

f is the factor of sparsify.py, a constant to the gradient. Separate products serve dropout, which cannot be merged,
and half precision, where a merged weight would round the delta away (|delta| is about 1e-6 at the start, half a unit
in the last place of a bfloat16 weight 1e-4). Drop path alone merges: kept samples see W0 + delta/keep, others W0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from snell_dist.ops.plan import Plan
from snell_dist.ops.regularize import keep_scale
from snell_dist.ops.threshold import bracket_of, by_bracket, by_radix
from snell_dist.ops.tiles import Matrix, Tile

# A run of samples with one drop-path fate becomes a product of its own; shorter ones are not worth it.
LEAST_RUN = 64


def thresholds(a: Tensor, b: Tensor, params: Tensor | None, hint: Tensor | None, plan: Plan) -> Tensor:
    """The threshold of each group, and half the width of a bracket for the next call: [2, groups].

    hint: an earlier result for the same layer; it changes the time, never the result.
    """
    matrix = Matrix(a, b, params, plan)
    found = torch.zeros(2, plan.groups, dtype=a.dtype, device=a.device)
    for part, (groups, sparsity) in enumerate(zip(plan.parts, plan.sparsities, strict=True)):
        if not plan.dense(sparsity):
            last = None if hint is None else hint[:, part]
            found[:, groups.start : groups.stop] = _threshold(matrix, groups, sparsity, last).unsqueeze(1)
    return found


def _threshold(matrix: Matrix, groups: range, sparsity: float, last: Tensor | None) -> Tensor:
    count = matrix.group_rows * matrix.in_features * len(groups)
    like = matrix.like
    if count == 0:
        return like.new_full((2,), torch.nan)

    def tiles() -> Iterator[Tensor]:
        return matrix.magnitudes(groups)

    def brackets() -> Iterator[tuple[float, float]]:
        if last is not None:
            middle, width = last.tolist()
            if width > 0:
                yield max(middle - width, 0.0), middle + width
        sample = matrix.sample(groups)
        for margin in (5.0, 25.0):
            yield bracket_of(sample, sparsity, margin)

    interpolated = matrix.plan.interpolated
    if like.device.type == "cpu":
        result = by_bracket(tiles, count, sparsity, interpolated, brackets())
        if result is not None:
            return torch.stack(result)
    value = by_radix(tiles, count, sparsity, interpolated, like)
    return torch.stack([value, torch.zeros_like(value)])


def factor_(magnitude: Tensor, threshold: Tensor, sparsify: str) -> Tensor:
    """sparsify.factor in place of the magnitudes. NaN stays, and a NaN threshold removes nothing."""
    if sparsify == "paper":
        return magnitude.sub_(threshold).clamp_min_(0)
    if magnitude.device.type == "cpu":
        torch.threshold_(magnitude, float(threshold), 0)  # one pass; a host read, free here
    else:
        magnitude.masked_fill_(magnitude <= threshold, 0)
    return magnitude if sparsify == "released" else magnitude.sign_()


def _factor(k: Tensor, group: int, found: Tensor | None, plan: Plan) -> Tensor | None:
    """f of a tile, as a new tensor; None for 1."""
    if found is None or plan.dense(plan.sparsity_of(group)):
        return None
    return factor_(k.abs(), found[group], plan.sparsify)


def _delta_(k: Tensor, factor: Tensor | None) -> Tensor:
    return k if factor is None else k.mul_(factor)


def _merge_(k: Tensor, factor: Tensor | None, weight: Tensor, scale: float) -> Tensor:
    """weight + scale k factor, in place of k."""
    if factor is not None and weight.dtype == k.dtype:
        return torch.addcmul(weight, k, factor, value=scale, out=k)
    delta = _delta_(k, factor)
    return (delta.mul_(scale) if scale != 1 else delta).add_(weight)


def merge_delta(a: Tensor, b: Tensor, params: Tensor | None, found: Tensor | None, plan: Plan) -> Tensor:
    """delta [out, in], tile by tile."""
    matrix = Matrix(a, b, params, plan)
    delta = b.new_empty(len(b), len(a))
    for tile in matrix.tiles():
        k = matrix.build(tile)
        delta[tile.rows, tile.cols] = _delta_(k, _factor(k, tile.group, found, plan))
    return delta


def runs(path: Tensor | None, tokens: int) -> list[tuple[slice, float]] | None:
    """Token ranges with one scale of drop path; None where they are too short or only the device knows them."""
    if path is None:
        return [(slice(0, tokens), 1.0)]
    if path.device.type != "cpu":
        return None
    each = tokens // max(len(path), 1)
    found: list[tuple[slice, float]] = []
    for i, scale in enumerate(path.tolist()):
        start = found.pop()[0].start if found and found[-1][1] == scale else i * each
        found.append((slice(start, (i + 1) * each), scale))
    return found if len(found) * LEAST_RUN <= tokens else None


def input_scale(x: Tensor, seed: Tensor | None, path: Tensor | None, plan: Plan) -> Tensor | None:
    """S: what the delta's input is multiplied by, broadcasting against x [..., in]; None for 1."""
    scale = None if seed is None else keep_scale(seed, x.shape, plan.dropout, x.dtype)
    if path is None:
        return scale
    by_sample = path.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return by_sample if scale is None else scale.mul_(by_sample)


def _mergeable(x: Tensor, seed: Tensor | None) -> bool:
    return seed is None and x.element_size() >= 4


def _add_product(out: Tensor, one: Tensor, two: Tensor, first: bool) -> None:
    """out = one two, or out += one two; a wider `out` collects half-precision products in its own precision."""
    if out.dtype != one.dtype:
        out.copy_(one @ two) if first else out.add_(one @ two)
    elif first:
        torch.mm(one, two, out=out)
    else:
        out.addmm_(one, two)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, params: Tensor | None,
    found: Tensor | None, seed: Tensor | None, path: Tensor | None, plan: Plan,
) -> Tensor:  # fmt: skip
    """x [..., in] -> y [..., out] in x's dtype; found: thresholds [groups] or None where all is dense."""
    matrix = Matrix(a, b, params, plan)
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty(len(flat), len(weight))
    parts = runs(path, len(flat)) if _mergeable(x, seed) else None
    scale = None if parts else input_scale(x, seed, path, plan)
    changed = flat if scale is None else (x * scale).view_as(flat)
    for tile in matrix.tiles():
        k = matrix.build(tile)
        factor = _factor(k, tile.group, found, plan)
        base, first, out = weight[tile.rows, tile.cols], tile.cols.start == 0, y[:, tile.rows]
        if parts is None:
            _add_product(out, flat[:, tile.cols], base.to(x.dtype).t(), first)
            out.addmm_(changed[:, tile.cols], _delta_(k, factor).to(x.dtype).t())
        else:
            _forward_merged(out, flat[:, tile.cols], k, factor, base, parts, first)
    if bias is not None:
        y.add_(bias)
    return y.view(*x.shape[:-1], len(weight))


def _forward_merged(
    out: Tensor,
    x: Tensor,
    k: Tensor,
    factor: Tensor | None,
    base: Tensor,
    parts: list[tuple[slice, float]],
    first: bool,
) -> None:
    kept = next((scale for _, scale in parts if scale), 1.0)
    whole = _merge_(k, factor, base, kept).to(x.dtype)
    for span, scale in parts:
        _add_product(out[span], x[span], (whole if scale else base.to(x.dtype)).t(), first)


def backward(
    gy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, params: Tensor | None,
    found: Tensor | None, seed: Tensor | None, path: Tensor | None, plan: Plan, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x [..., in] (empty if not needed), a, b, params, given gy [..., out]."""
    matrix = Matrix(a, b, params, plan)
    flat, up = x.reshape(-1, x.shape[-1]), gy.reshape(-1, gy.shape[-1])
    parts = runs(path, len(flat)) if _mergeable(x, seed) else None
    scale = None if parts else input_scale(x, seed, path, plan)
    changed = flat if scale is None else (x * scale).view_as(flat)
    # Tiles add up in gx; half precision would round at each of them.
    gx = torch.empty(flat.shape if needs_x else 0, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for tile in matrix.tiles():
        k = matrix.build(tile, keep=True)
        factor = _factor(k, tile.group, found, plan)
        first, down = tile.rows.start == 0, up[:, tile.rows]
        grad = k if k.dtype == x.dtype else k.new_empty(k.shape, dtype=x.dtype)
        if parts is None:
            if needs_x:
                _add_product(gx[:, tile.cols], down, _delta_(k, factor).to(x.dtype), first)
            torch.mm(down.t(), changed[:, tile.cols], out=grad)
        else:
            _backward_merged(gx, down, flat, k, factor, weight[tile.rows, tile.cols], parts, tile, first, grad)
        wide = grad.to(k.dtype)
        matrix.engines[tile.group].backward(wide if factor is None else wide.mul_(factor))
    if needs_x and parts is None:
        if scale is not None:
            gx.view(x.shape).mul_(scale)
        for tile in matrix.tiles():
            _add_product(gx[:, tile.cols], up[:, tile.rows], weight[tile.rows, tile.cols].to(x.dtype), False)
    grad_a, grad_b, grad_params = matrix.gradients()
    return gx.view(x.shape if needs_x else 0).to(x.dtype), grad_a, grad_b, grad_params


def _backward_merged(
    gx: Tensor, down: Tensor, x: Tensor, k: Tensor, factor: Tensor | None, base: Tensor,
    parts: list[tuple[slice, float]], tile: Tile, first: bool, grad: Tensor,
) -> None:  # fmt: skip
    """Adds to gx, and writes dL/d(delta) of the tile into `grad`, which may be k itself."""
    kept = next((scale for _, scale in parts if scale), 1.0)
    if gx.numel():
        whole = _merge_(k, factor, base, kept).to(x.dtype)
        for span, scale in parts:
            _add_product(gx[span, tile.cols], down[span], whole if scale else base.to(x.dtype), first)
    begun = False
    for span, scale in parts:
        if scale:
            torch.addmm(grad, down[span].t(), x[span, tile.cols], beta=begun, alpha=kept, out=grad)
            begun = True
    if not begun:
        grad.zero_()
