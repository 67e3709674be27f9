"""SNELL in one autograd function: one merged product forward, three dense products a step, no delta kept.

Between forward and backward it keeps x, the weight parameter itself (no view, cast or copy, so that sharded
engines can take it away and bring it back), the factors, and a threshold per group. Backward makes the delta
again from the factors, a tile of rows at a time, and turns each tile of dL/d(delta) into gradients of the
factors while it is in the processor's cache.

    forward    K tiles -> threshold -> W = W0 + K f(|K|) -> y = x W^T
    backward   K tiles -> W -> dx = dy W;   G = dy^T x, dK = G f(|K|) -> da, db

f is |K| on survivors (`released`), |K| - t (`paper`) or 1 (`hard`); it is a constant to the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from snell_dist.ops import kernels
from snell_dist.ops.kernels import TilesLike
from snell_dist.ops.regularise import dropout_mask, kept_samples
from snell_dist.ops.threshold import threshold

TILE_BYTES = 2**20  # of one float32 tile: a handful of them fit the processor's cache
SCRATCH_TILES = 6  # tiles that are alive together in backward


@dataclass(frozen=True)
class Form:
    """What stays the same over the calls of one layer; see `snell_linear`."""

    sparsity: Sequence[float]
    kernel: str
    sparsify: str
    scope: str
    workspace_bytes: int  # 0: as much as one matrix in the factors' dtype

    @property
    def dense(self) -> bool:
        """Whether the kernel's matrix is used as it is."""
        return max(self.sparsity) == 0 and kernels.find(self.kernel).DENSE_AT_ZERO


@dataclass(frozen=True)
class Rows:
    """A tile: rows `whole` of the matrix, rows `own` of its group."""

    group: int
    own: slice
    whole: slice


class Merged:
    """The merged matrix of one layer, made row tile by row tile."""

    def __init__(self, a: Tensor, b: Tensor, scalars: Tensor | None, form: Form) -> None:
        groups, module = len(form.sparsity), kernels.find(form.kernel)
        self.form, self.module = form, module
        self.columns, self.b = a.shape[0], b
        scales = [None] * groups if scalars is None else scalars.unbind(0)
        self.engines: list[TilesLike] = [
            kernels.tiles_of(module, one, two) for one, two in zip(a.chunk(groups, 1), scales, strict=True)
        ]
        self.group_rows = b.shape[0] // groups
        row_bytes = max(1, self.columns * b.element_size())
        budget = form.workspace_bytes or b.shape[0] * row_bytes
        tile_bytes = min(TILE_BYTES, budget // (2 * SCRATCH_TILES)) if form.workspace_bytes else TILE_BYTES
        self.tile_rows = max(1, tile_bytes // row_bytes) if module.ROWS_INDEPENDENT else self.group_rows
        if form.workspace_bytes:  # half for the block, half for the tiles
            budget //= 2
        self.block_rows = max(self.tile_rows, budget // row_bytes)

    def rows(self, start: int, stop: int) -> Iterator[Rows]:
        """Tiles that cover rows start..stop, none across two groups."""
        while start < stop:
            group = start // self.group_rows
            first = group * self.group_rows
            end = min(stop, start + self.tile_rows, first + self.group_rows)
            yield Rows(group, slice(start - first, end - first), slice(start, end))
            start = end

    def blocks(self) -> Iterator[slice]:
        """Rows whose weight is made at once: all of them, unless the workspace is bounded."""
        rows = self.b.shape[0]
        step = self.block_rows
        if not self.module.ROWS_INDEPENDENT:
            step = max(1, step // self.group_rows) * self.group_rows
        for start in range(0, rows, step):
            yield slice(start, min(rows, start + step))

    def merge(self, rows: Rows, keep: bool = False) -> tuple[Tensor, Any]:
        return self.engines[rows.group].merge(self.b[rows.whole], keep)

    def thresholds(self, stored: Tensor | None) -> Tensor:
        """One per group; from the stored matrix, or from tiles made anew where there is none."""
        groups, form = len(self.engines), self.form
        if form.dense or self.b.numel() == 0 or self.columns == 0:
            return self.b.new_zeros(groups)
        spans = [(0, self.b.shape[0])] if form.scope == "matrix" else None
        spans = spans or [(g * self.group_rows, (g + 1) * self.group_rows) for g in range(groups)]
        found = []
        for (start, stop), sparsity in zip(spans, form.sparsity, strict=False):

            def tiles(start: int = start, stop: int = stop) -> Iterator[Tensor]:
                for rows in self.rows(start, stop):
                    yield self.merge(rows)[0] if stored is None else stored[rows.whole]

            count = (stop - start) * self.columns
            found.append(threshold(tiles, count, sparsity, form.sparsify, self.b.device))
        return torch.stack(found).expand(groups) if len(found) == 1 else torch.stack(found)

    def factor(self, k: Tensor, t: Tensor) -> Tensor | None:
        """f(|K|) as a new tensor, None for 1. A NaN threshold leaves every entry in, so that NaN is seen."""
        if self.form.dense:
            return None
        magnitude = k.abs()
        if self.form.sparsify == "paper":
            return magnitude.sub_(t).clamp_min_(0)
        survives = torch.le(magnitude, t).logical_not_()
        return survives.to(k.dtype) if self.form.sparsify == "hard" else magnitude.mul_(survives)

    def fill(
        self, block: slice, out: Tensor, thresholds: Tensor, base: Tensor | None, scale: float, stored: bool
    ) -> None:
        """Writes base + scale * delta of a block's rows into `out`, which holds their K already if `stored`."""
        for rows in self.rows(block.start, block.stop):
            target = out[rows.whole.start - block.start : rows.whole.stop - block.start]
            k = target if stored else self.merge(rows)[0]
            self.write(target, k, self.factor(k, thresholds[rows.group]), rows, base, scale)

    def write(self, target: Tensor, k: Tensor, f: Tensor | None, rows: Rows, base: Tensor | None, scale: float) -> None:
        torch.mul(k, scale if f is None else f.mul_(scale) if scale != 1 else f, out=target)
        if base is not None:
            target.add_(base[rows.whole])


def delta(a: Tensor, b: Tensor, scalars: Tensor | None, form: Form) -> Tensor:
    """The merged, sparsified matrix [out, in]."""
    merged = Merged(a, b, scalars, form)
    out = a.new_empty(b.shape[0], a.shape[0])
    whole = slice(0, b.shape[0])
    _store(merged, out)
    merged.fill(whole, out, merged.thresholds(out), None, 1.0, stored=True)
    return out


def _store(merged: Merged, out: Tensor) -> None:
    for rows in merged.rows(0, len(out)):
        out[rows.whole] = merged.merge(rows)[0]


def _product(
    x: Tensor, out: Tensor, merged: Merged, thresholds: Tensor | None, base: Tensor | None, scale: float
) -> Tensor:
    """out += x (base + scale * delta)^T, [T, in] to [T, out]. Returns the thresholds, found where None were given."""
    blocks = list(merged.blocks())
    whole = len(blocks) == 1
    matrix = merged.b.new_empty(blocks[0].stop if blocks else 0, merged.columns)
    stored = whole and thresholds is None
    if stored:
        _store(merged, matrix)
    if thresholds is None:
        thresholds = merged.thresholds(matrix if stored else None)
    for block in blocks:
        part = matrix[: block.stop - block.start]
        merged.fill(block, part, thresholds, base, scale, stored)
        out[:, block].addmm_(x, part.to(x.dtype).t())
    return thresholds


def _gradients(
    gy: Tensor, x: Tensor, gx: Tensor | None, merged: Merged, thresholds: Tensor, base: Tensor | None, scale: float
) -> Tensor:
    """gx += gy (base + scale * delta), and returns dL/db; dL/da and dL/dscalars add up in `merged`.

    gy [T, out], x [T, in].
    """
    grad_b = torch.empty_like(merged.b)
    blocks = list(merged.blocks())
    matrix = merged.b.new_empty(blocks[0].stop if blocks and gx is not None else 0, merged.columns)
    for block in blocks:
        for rows in merged.rows(block.start, block.stop):
            k, kept = merged.merge(rows, keep=True)
            f = merged.factor(k, thresholds[rows.group])
            grad = (gy[:, rows.whole].t() @ x).to(k.dtype)
            if f is not None:
                grad.mul_(f)
            if scale != 1:
                grad.mul_(scale)
            grad_b[rows.whole] = merged.engines[rows.group].gradient(grad, kept)
            if gx is not None:
                target = matrix[rows.whole.start - block.start : rows.whole.stop - block.start]
                merged.write(target, k, f, rows, base, scale)
        if gx is not None:
            gx.addmm_(gy[:, block], matrix[: block.stop - block.start].to(gy.dtype))
    return grad_b


def _split(x: Tensor, drop_path: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    assert seed is not None
    kept, lost = kept_samples(len(x), drop_path, seed)
    return kept.to(x.device, non_blocking=True), lost.to(x.device, non_blocking=True)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scalars: Tensor | None,
    thresholds: Tensor | None,
    seed: Tensor | None,
    form: Form,
    dropout: float,
    drop_path: float,
) -> tuple[Tensor, Tensor]:
    """y [..., out] in x's dtype, and the thresholds [groups]."""
    merged = Merged(a, b, scalars, form)
    keep = 1 / (1 - drop_path)
    flat = x.flatten(0, -2)
    start = bias.to(x.dtype) if bias is not None else x.new_zeros(())
    if not dropout and not drop_path:
        y = start.expand(len(flat), len(weight)).contiguous()
        thresholds = _product(flat, y, merged, thresholds, weight, 1.0)
    elif dropout:
        assert seed is not None
        y = F.linear(flat, weight.to(x.dtype), None if bias is None else start)
        changed = x * dropout_mask(x, dropout, seed)
        if drop_path:
            kept, _ = _split(x, drop_path, seed)
            changed *= x.new_zeros(len(x), *[1] * (x.ndim - 1)).index_fill_(0, kept, keep)
        thresholds = _product(changed.flatten(0, -2), y, merged, thresholds, None, 1.0)
    else:
        kept, lost = _split(x, drop_path, seed)
        y = start.expand(*x.shape[:-1], len(weight)).contiguous()
        part = y[kept].flatten(0, -2)
        thresholds = _product(x[kept].flatten(0, -2), part, merged, thresholds, weight, keep)
        y[kept] = part.view(len(kept), *y.shape[1:])
        y[lost] = F.linear(x[lost], weight.to(x.dtype), None if bias is None else start)
    return y.view(*x.shape[:-1], len(weight)), thresholds


def backward(
    gy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scalars: Tensor | None,
    thresholds: Tensor,
    seed: Tensor | None,
    form: Form,
    dropout: float,
    drop_path: float,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty if not needed), a, b and the scalars (empty if there are none)."""
    merged = Merged(a, b, scalars, form)
    keep = 1 / (1 - drop_path)
    flat_gy = gy.flatten(0, -2)
    # Blocks add up in gx, so half precision sums in float32.
    wide = torch.float32 if form.workspace_bytes and x.dtype.itemsize < 4 else x.dtype
    gx = torch.zeros(x.shape, dtype=wide, device=x.device) if needs_x else None
    flat_gx = None if gx is None else gx.flatten(0, -2)
    if not dropout and not drop_path:
        grad_b = _gradients(flat_gy.to(wide), x.flatten(0, -2).to(wide), flat_gx, merged, thresholds, weight, 1.0)
    elif dropout:
        assert seed is not None
        mask = dropout_mask(x, dropout, seed)
        if drop_path:
            kept, _ = _split(x, drop_path, seed)
            mask *= x.new_zeros(len(x), *[1] * (x.ndim - 1)).index_fill_(0, kept, keep)
        changed = (x * mask).flatten(0, -2).to(wide)
        grad_b = _gradients(flat_gy.to(wide), changed, flat_gx, merged, thresholds, None, 1.0)
        if flat_gx is not None:
            flat_gx.mul_(mask.flatten(0, -2)).addmm_(flat_gy.to(wide), weight.to(wide))
    else:
        kept, lost = _split(x, drop_path, seed)
        part_gy, part = gy[kept].flatten(0, -2).to(wide), x[kept].flatten(0, -2).to(wide)
        part_gx = None if gx is None else torch.zeros_like(part)
        grad_b = _gradients(part_gy, part, part_gx, merged, thresholds, weight, keep)
        if gx is not None and part_gx is not None:
            gx[kept] = part_gx.view(len(kept), *x.shape[1:])
            gx[lost] = (gy[lost].to(wide) @ weight.to(wide)).view(len(lost), *x.shape[1:])
    sums = [engine.sums() for engine in merged.engines]
    grad_a = torch.cat([one for one, _ in sums], 1)
    grad_scalars = x.new_empty(0) if scalars is None else torch.stack([s for _, s in sums if s is not None])
    return x.new_empty(0) if gx is None else gx.to(x.dtype), grad_a, grad_b, grad_scalars
