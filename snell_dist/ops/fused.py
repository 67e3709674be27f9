"""Forward and backward of the adapted layer over tiles of its merged matrix; no autograd here (library.py has it).

    merged     W = W0 + scale K f        y = x W^T,  dx = dy W                three dense products a step
    separate   y = x W0^T + (x S) (K f)^T,  dx = dy W0 + S (dy K f)           five; S: dropout's mask times drop path
    both       G = dy^T (x S), dK = G f -> da, db by the kernel's thin products

f is the factor of sparsify.py, a constant to the gradient. Separate products serve dropout, which cannot be merged,
and half precision, where a merged weight would round the delta away (|delta| is about 1e-6 at the start, half a unit
in the last place of a bfloat16 weight 1e-4). Drop path alone merges: kept samples see W0 + delta/keep, others W0.
Without a weight the delta's product is all there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from snell_dist.ops.merging import factor_of, fill, merge, store_and_look, thresholds
from snell_dist.ops.plan import Plan
from snell_dist.ops.regularize import keep_scale
from snell_dist.ops.tiles import TILE_ELEMENTS, Block, Matrix, representatives
from snell_dist.standing import kind

# A run of samples with one drop-path fate becomes a product of its own; shorter ones are not worth it.
LEAST_RUN = 64


def _front(memory: Tensor, block: Block) -> Tensor:
    """The block's shape at the front of a flat buffer."""
    rows, cols = block.rows.stop - block.rows.start, block.cols.stop - block.cols.start
    return memory[: rows * cols].view(rows, cols)


def _buffer(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """Room for the largest block [elements]."""
    most = max(((b.rows.stop - b.rows.start) * (b.cols.stop - b.cols.start) for b in matrix.blocks()), default=0)
    return matrix.like.new_empty(most, dtype=dtype)


def _lend_rest(buffer: Tensor, block: Block, blocks: list[Block], matrix: Matrix) -> None:
    """After the first block the output that was lent is in use: tiles move to what a smaller block leaves."""
    if block != blocks[0]:
        matrix.lend(buffer[(block.rows.stop - block.rows.start) * (block.cols.stop - block.cols.start) :])


def rows(x: Tensor) -> Tensor:
    """[..., features] -> [tokens, features]."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def runs(path: Tensor | None, tokens: int) -> list[tuple[slice, float]] | None:
    """Token ranges with one scale of drop path; None where they are too short or only the device knows them."""
    if path is None:
        return [(slice(0, tokens), 1.0)]
    if kind(path.device) != "cpu":
        return None
    if path.is_meta:  # merged where any fates would be
        return [(slice(0, tokens), 1.0)] if len(path) * LEAST_RUN <= tokens else None
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


def _add_product(
    out: Tensor, one: Tensor, two: Tensor, first: bool, alpha: float = 1.0, bias: Tensor | None = None
) -> None:
    """out = alpha one two + bias, or out += it; a wider `out` collects half-precision products in its precision."""
    if first and bias is not None:
        torch.addmm(bias.to(out.dtype), one, two, out=out)
    elif out.dtype != one.dtype:
        out.copy_(one @ two) if first else out.add_(one @ two)
    elif first and alpha == 1:
        torch.mm(one, two, out=out)
    else:
        torch.addmm(out, one, two, beta=not first, alpha=alpha, out=out)


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in another dtype, a few at a time; all at once where it has that dtype already."""
    step = len(weight) if weight.dtype == dtype else max(TILE_ELEMENTS // max(weight.shape[1], 1), 1)
    cuts = [slice(start, min(start + step, len(weight))) for start in range(0, len(weight), max(step, 1))]
    for cut in representatives(cuts, weight):
        yield cut, weight[cut].to(dtype)


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


def _shape(x: Tensor, seed: Tensor | None, path: Tensor | None, plan: Plan, weight: Tensor | None) -> Shape:
    flat = rows(x)
    merges = weight is not None and seed is None and x.element_size() >= 4
    parts = runs(path, len(flat)) if merges else None
    scale = None if parts is not None else input_scale(x, seed, path, plan)
    return Shape(flat, parts, scale, flat if scale is None else (x * scale).reshape(flat.shape))


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, params: Tensor | None,
    given: Tensor | None, hint: Tensor | None, seed: Tensor | None, path: Tensor | None, plan: Plan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x [..., in] -> y [..., out] in x's dtype, and what `thresholds` found [2, groups] unless it was given."""
    how = _shape(x, seed, path, plan, weight)
    y = x.new_empty(len(how.flat), len(b))
    matrix = Matrix(a, b, params, plan, spare=y if y.dtype == b.dtype else None)
    buffer, blocks = _buffer(matrix, x.dtype), matrix.blocks()
    look, found, built = given is None and not plan.all_dense, given, set[tuple[int, int]]()
    if look and blocks and x.dtype == b.dtype:
        found, built = store_and_look(_front(buffer, blocks[0]), blocks, matrix, hint)
    elif look:
        found = thresholds(matrix, hint)
    for block in blocks:
        _lend_rest(buffer, block, blocks, matrix)
        part = _front(buffer, block)
        limits = None if found is None else found[0]
        fill(part, block, matrix, limits, None if how.parts is None else weight, how.kept, built)
        out, flat, first = y[:, block.rows], how.flat[:, block.cols], block.cols.start == 0
        if weight is None:
            _add_product(out, how.changed[:, block.cols], part.t(), first)
            continue
        base, shift = weight[block.rows, block.cols], None if bias is None else bias[block.rows]
        for span, scale in how.parts or [(slice(None), 0.0)]:
            for cut, own in [(slice(None), part)] if scale else _in_dtype(base, x.dtype):
                own_shift = None if shift is None else shift[cut]
                _add_product(out[span, cut], flat[span], own.t(), first, bias=own_shift)
        if how.parts is None:
            out.addmm_(how.changed[:, block.cols], part.t())
    # A custom op may not return its input.
    result = matrix.like.new_empty(2, plan.groups) if found is None or not look else found
    return y.view(*x.shape[:-1], len(b)), result


def backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, params: Tensor | None,
    found: Tensor | None, seed: Tensor | None, path: Tensor | None, plan: Plan, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x [..., in] (empty if not needed), a, b, params, given gy [..., out]."""
    how, up = _shape(x, seed, path, plan, weight), rows(gy)
    # Blocks add up in gx; half precision would round at each of them.
    wide = torch.promote_types(x.dtype, torch.float32)
    gx = torch.empty(how.flat.shape if needs_x else 0, dtype=wide, device=x.device)
    matrix = Matrix(a, b, params, plan, spare=gx if needs_x and x.dtype == b.dtype else None)
    buffer = _buffer(matrix, x.dtype)
    for block in matrix.blocks():
        _lend_rest(buffer, block, matrix.blocks(), matrix)
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
        base = None if how.parts is None else weight  # what the gradient's room is filled with, beside the delta
        _factor_gradients(grad, block, matrix, None if found is None else found[0], base, how.kept, needs_x)
        if needs_x:
            target = gx[:, block.cols]
            for span, scale in how.parts or [(slice(None), 1.0)]:
                cuts: Iterable[tuple[slice, Tensor]] = [(slice(None), grad)]
                if not scale and base is not None:
                    cuts = _in_dtype(base[block.rows, block.cols], x.dtype)
                for i, (cut, own) in enumerate(cuts):
                    _add_product(target[span], down[span, cut], own, first and i == 0)
    if needs_x and how.scale is not None:
        gx.view(x.shape).mul_(how.scale)
    if needs_x and how.parts is None and weight is not None:
        for block in matrix.blocks():
            down = up[:, block.rows]
            for cut, own in _in_dtype(weight[block.rows, block.cols], x.dtype):
                _add_product(gx[:, block.cols], down[:, cut], own, False)
    grad_a, grad_b, grad_params = matrix.gradients()
    return gx.view(x.shape if needs_x else 0).to(x.dtype), grad_a, grad_b, grad_params


def _factor_gradients(
    grad: Tensor, block: Block, matrix: Matrix, found: Tensor | None, weight: Tensor | None, scale: float, merging: bool
) -> None:
    """From dL/d(delta) of a block to the sums in the matrix's engines.

    With `merging`, each tile of the gradient makes room, once it is used, for what `fill` would write there.
    """
    for tile in matrix.tiles(block):
        own, k = tile.of(grad, block), matrix.build(tile, keep=True)
        factor = factor_of(matrix, tile, k, found)
        wide = own.to(k.dtype)
        matrix.backward(tile, wide if factor is None else wide.mul_(factor))
        if merging:
            merge(own, k, factor, None if weight is None else weight[tile.rows, tile.cols], scale)
