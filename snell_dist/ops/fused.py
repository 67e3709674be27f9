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
from dataclasses import dataclass

import torch
from torch import Tensor

from snell_dist.ops.plan import Plan
from snell_dist.ops.regularize import keep_scale
from snell_dist.ops.threshold import bracket_of, by_bracket, by_partition, by_radix
from snell_dist.ops.tiles import Block, Matrix

# A run of samples with one drop-path fate becomes a product of its own; shorter ones are not worth it.
LEAST_RUN = 64


# Half widths of the brackets that are tried, in standard deviations of the sample's quantile if it were independent.
MARGINS = 6.0, 24.0


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
        for margin in MARGINS:
            yield bracket_of(sample, sparsity, margin)

    interpolated = matrix.plan.interpolated
    if like.device.type == "cpu":
        result = by_bracket(tiles, count, sparsity, interpolated, brackets())
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
    if magnitude.device.type == "cpu":
        torch.threshold_(magnitude, float(threshold), 0)  # one pass; a host read, free here
    else:
        magnitude.masked_fill_(magnitude <= threshold, 0)
    return magnitude if sparsify == "released" else magnitude.sign_()


def fill(
    out: Tensor, block: Block, matrix: Matrix, found: Tensor | None, weight: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Writes weight + scale delta of a block (or delta alone) into the front of `out`, tile by tile."""
    part = _front(out, block)
    for tile in matrix.tiles(block):
        k, target = matrix.build(tile), tile.of(part, block)
        base = None if weight is None else weight[tile.rows, tile.cols]
        factor = None
        if found is not None and not matrix.plan.dense(matrix.plan.sparsity_of(tile.group)):
            factor = factor_(matrix.magnitude(tile, k), found[tile.group], matrix.plan.sparsify)
        if factor is not None and base is not None and base.dtype == k.dtype == target.dtype:
            torch.addcmul(base, k, factor, value=scale, out=target)
            continue
        delta = k if factor is None else k.mul_(factor)
        if scale != 1:
            delta.mul_(scale)
        target.copy_(delta if base is None else delta.add_(base))
    return part


def _front(memory: Tensor, block: Block) -> Tensor:
    """The block's shape at the front of a flat buffer."""
    rows, cols = block.rows.stop - block.rows.start, block.cols.stop - block.cols.start
    return memory[: rows * cols].view(rows, cols)


def _buffer(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Room for the largest block [elements]."""
    most = max(((b.rows.stop - b.rows.start) * (b.cols.stop - b.cols.start) for b in matrix.blocks()), default=0)
    return matrix.like.new_empty(most, dtype=dtype)


def merge_delta(a: Tensor, b: Tensor, params: Tensor | None, found: Tensor | None, plan: Plan) -> Tensor:
    """delta [out, in], tile by tile."""
    whole = Block(slice(0, len(b)), slice(0, len(a)))
    return fill(b.new_empty(len(b) * len(a)), whole, Matrix(a, b, params, plan), found)


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


def _add_product(out: Tensor, one: Tensor, two: Tensor, first: bool, alpha: float = 1.0) -> None:
    """out = alpha one two, or out += it; a wider `out` collects half-precision products in its own precision."""
    if out.dtype != one.dtype:
        out.copy_(one @ two) if first else out.add_(one @ two)
    elif first and alpha == 1:
        torch.mm(one, two, out=out)
    else:
        torch.addmm(out, one, two, beta=not first, alpha=alpha, out=out)


@dataclass(frozen=True)
class Shape:
    """How one call multiplies: runs of tokens with one scale if merged, else the separate delta's input."""

    flat: Tensor  # x [tokens, in]
    parts: list[tuple[slice, float]] | None
    scale: Tensor | None
    changed: Tensor  # x S [tokens, in]

    @property
    def kept(self) -> float:
        """What drop path multiplies the delta of kept samples by."""
        return next((scale for _, scale in self.parts or () if scale), 1.0)


def _shape(x: Tensor, seed: Tensor | None, path: Tensor | None, plan: Plan) -> Shape:
    flat = x.reshape(-1, x.shape[-1])
    parts = runs(path, len(flat)) if seed is None and x.element_size() >= 4 else None
    scale = None if parts is not None else input_scale(x, seed, path, plan)
    return Shape(flat, parts, scale, flat if scale is None else (x * scale).view_as(flat))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, params: Tensor | None,
    found: Tensor | None, seed: Tensor | None, path: Tensor | None, plan: Plan,
) -> Tensor:  # fmt: skip
    """x [..., in] -> y [..., out] in x's dtype; found: thresholds [groups] or None where all is dense."""
    how = _shape(x, seed, path, plan)
    y = x.new_empty(len(how.flat), len(weight))
    matrix = Matrix(a, b, params, plan, spare=y if y.dtype == b.dtype else None)
    buffer = _buffer(matrix, x.dtype)
    for block in matrix.blocks():
        base = weight[block.rows, block.cols]
        part = fill(buffer, block, matrix, found, None if how.parts is None else weight, how.kept)
        out, flat, first = y[:, block.rows], how.flat[:, block.cols], block.cols.start == 0
        for span, scale in how.parts or ():
            _add_product(out[span], flat[span], (part if scale else base.to(x.dtype)).t(), first)
        if how.parts is None:
            _add_product(out, flat, base.to(x.dtype).t(), first)
            out.addmm_(how.changed[:, block.cols], part.t())
    if bias is not None:
        y.add_(bias)
    return y.view(*x.shape[:-1], len(weight))


def backward(
    gy: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, params: Tensor | None,
    found: Tensor | None, seed: Tensor | None, path: Tensor | None, plan: Plan, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x [..., in] (empty if not needed), a, b, params, given gy [..., out]."""
    how, up = _shape(x, seed, path, plan), gy.reshape(-1, gy.shape[-1])
    # Blocks add up in gx; half precision would round at each of them.
    wide = torch.promote_types(x.dtype, torch.float32)
    gx = torch.empty(how.flat.shape if needs_x else 0, dtype=wide, device=x.device)
    matrix = Matrix(a, b, params, plan, spare=gx if needs_x and gx.dtype == b.dtype else None)
    buffer = _buffer(matrix, x.dtype)
    for block in matrix.blocks():
        down, first = up[:, block.rows], block.rows.start == 0
        grad = _front(buffer, block)
        if how.parts is None:
            torch.mm(down.t(), how.changed[:, block.cols], out=grad)
        else:
            spans = [span for span, scale in how.parts if scale]
            for i, span in enumerate(spans):
                _add_product(grad, down[span].t(), how.flat[span, block.cols], i == 0, how.kept)
            if not spans:
                grad.zero_()
        _factor_gradients(grad, block, matrix, found)
        if needs_x:
            part = fill(buffer, block, matrix, found, None if how.parts is None else weight, how.kept)
            target, base = gx[:, block.cols], weight[block.rows, block.cols]
            for span, scale in how.parts or [(slice(None), 1.0)]:
                _add_product(target[span], down[span], part if scale else base.to(x.dtype), first)
    if needs_x and how.parts is None:
        if how.scale is not None:
            gx.view(x.shape).mul_(how.scale)
        for block in matrix.blocks():
            base = weight[block.rows, block.cols].to(x.dtype)
            _add_product(gx[:, block.cols], up[:, block.rows], base, False)
    grad_a, grad_b, grad_params = matrix.gradients()
    return gx.view(x.shape if needs_x else 0).to(x.dtype), grad_a, grad_b, grad_params


def _factor_gradients(grad: Tensor, block: Block, matrix: Matrix, found: Tensor | None) -> None:
    """From dL/d(delta) of a block, which is overwritten, to the sums in the matrix's engines."""
    for tile in matrix.tiles(block):
        k, own = matrix.build(tile, keep=True), tile.of(grad, block).to(matrix.like.dtype)
        if found is not None and not matrix.plan.dense(matrix.plan.sparsity_of(tile.group)):
            own.mul_(factor_(k.abs_(), found[tile.group], matrix.plan.sparsify))
        matrix.engines[tile.group].backward(own)
