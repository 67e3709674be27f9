"""The merged matrix K of one layer, a tile at a time, and the way back from a tile's gradient to the factors.

A tile lies within one row group. Kernels whose elements are independent are cut in row tiles [n, in]; one that
couples the out axis (SNELLA's softmax) in column tiles [out/groups, n].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from snell_dist.ops import kernels
from snell_dist.ops.plan import Plan

# A tile's elements: few enough that the passes over it stay in cache, enough that starting them costs nothing.
TILE_ELEMENTS = 1 << 18
# What is looked at to guess a threshold: square patches of this width, or so many whole columns.
PATCH = 16
COLUMNS = 64


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the whole weight; `own` are the same rows counted in their group."""

    group: int
    rows: slice
    cols: slice
    own: slice

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from the other tiles (slices are not hashable)."""
        return self.rows.start, self.cols.start

    def of(self, tensor: Tensor, block: Block) -> Tensor:
        """This tile's part of a tensor that holds the block."""
        r, c = block.rows.start, block.cols.start
        return tensor[self.rows.start - r : self.rows.stop - r, self.cols.start - c : self.cols.stop - c]


@dataclass(frozen=True)
class Block:
    """Rows and columns of the whole weight that go through the dense products together."""

    rows: slice
    cols: slice


class Engine(Protocol):
    """One group's kernel: tiles of K, and gradients added up over tiles."""

    def build(self, rows: slice, cols: slice, keep: bool, pool: Tensor | None, out: Tensor | None) -> Tensor:
        """K [rows, cols], in `out` if given; the caller may overwrite it.

        With `keep`, what `backward` needs stays until then. pool [SLOTS, rows, cols]: room for all that; the last slot
        is the caller's.
        """
        ...

    def backward(self, grad: Tensor) -> None:
        """Adds the gradient of the tile built last (with `keep`), given dL/dK."""
        ...

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """dL/da [in, rank], dL/db [out, rank], dL/dparams [scalars]."""
        ...


class GenericEngine:
    """Any kernel, by its `merged` and `pullback`."""

    SLOTS = 0

    def __init__(self, kernel: Any, a: Tensor, b: Tensor, params: Tensor | None) -> None:
        self._kernel, self._a, self._b = kernel, a, b
        self._scalars = kernels.scalars(kernel, params)
        self._sums = torch.zeros_like(a), torch.zeros_like(b)
        self._sum_scalars = None if params is None else torch.zeros_like(params)

    def build(self, rows: slice, cols: slice, keep: bool, pool: Tensor | None, out: Tensor | None) -> Tensor:
        self._place = rows, cols
        k = self._kernel.merged(self._a[cols], self._b[rows], self._scalars)
        return k if out is None else out.copy_(k)

    def backward(self, grad: Tensor) -> None:
        rows, cols = self._place
        grad_a, grad_b, scalars = self._kernel.pullback(self._a[cols], self._b[rows], self._scalars, grad)
        self._sums[0][cols] += grad_a
        self._sums[1][rows] += grad_b
        if self._sum_scalars is not None:
            self._sum_scalars += torch.stack([scalars[name] for name in self._kernel.PARAMS])

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return *self._sums, self._sum_scalars


class Matrix:
    """The tiles of one layer: a [in, groups*rank], b [out, rank], params [scalars, groups].

    spare: memory of the factors' dtype that may be overwritten while tiles are made (an output not yet written).
    """

    def __init__(self, a: Tensor, b: Tensor, params: Tensor | None, plan: Plan, spare: Tensor | None = None) -> None:
        self._kernel = kernels.find(plan.kernel)
        self.plan, self.like, self.out_features, self.in_features = plan, b, len(b), len(a)
        self.group_rows = len(b) // plan.groups
        self._parts = [
            (one, two, None if params is None else params[:, g])
            for g, (one, two) in enumerate(zip(a.chunk(plan.groups, 1), b.chunk(plan.groups, 0), strict=True))
        ]
        make = getattr(self._kernel, "Engine", None)
        self.engines: list[Engine] = [
            GenericEngine(self._kernel, *part) if make is None else make(*part) for part in self._parts
        ]
        self._by_rows = self._kernel.AXIS == "rows"
        self._slots = GenericEngine.SLOTS if make is None else make.SLOTS
        count, size = self.out_features * self.in_features, b.element_size()
        budget = plan.workspace // size or count
        # Thin arrays (a sample, what engines hold of the factors) and what a selection gathers count as well; where
        # they are most of a small matrix, only a bound that was asked for is worth slow tiles.
        longer, thin = max(len(a), len(b), 1), a.numel() + b.numel()
        look = max(3 * longer * (b.shape[1] + PATCH), int(3 * count / longer**0.5))
        reserve = max(5 * thin // 4 + look, 5 * thin // 2)
        if plan.workspace:
            budget = max(budget - reserve, budget // 8)
        elif reserve < 2 * budget // 5:
            budget -= reserve
        self._lent = bool(self._slots) and spare is not None and not plan.workspace
        self._room_size = 0 if self._lent else min(TILE_ELEMENTS * self._kernel.LIVE, budget // 2)
        self._block_lines = max((budget - self._room_size) // max(self._line(), 1), 1)
        self._pool: Tensor | None = None
        if self._lent and spare is not None:
            self.lend(spare)

    def lend(self, memory: Tensor) -> None:
        """Room that tiles may use from now on, in place of what was lent before; no effect where none was lent."""
        if self._lent:
            self._pool = memory.view(-1)
            self._room_size = min(TILE_ELEMENTS * self._slots, memory.numel())

    def _line(self) -> int:
        """Elements of a line: a row of the weight, or a column."""
        return self.in_features if self._by_rows else self.out_features

    @property
    def _tile_lines(self) -> int:
        """Lines of a tile; its part of a line is within one group."""
        line = self.in_features if self._by_rows else self.group_rows
        return max(self._room_size // max(line * (self._slots if self._lent else self._kernel.LIVE), 1), 1)

    def blocks(self) -> list[Block]:
        """The whole weight in as few parts as the workspace allows; all but the last are of one size."""
        rows, cols = slice(0, self.out_features), slice(0, self.in_features)
        lines = self.out_features if self._by_rows else self.in_features
        cuts = [slice(at, min(at + self._block_lines, lines)) for at in range(0, lines, self._block_lines)]
        return [Block(cut, cols) if self._by_rows else Block(rows, cut) for cut in representatives(cuts, self.like)]

    def tiles(self, block: Block, groups: range | None = None) -> Iterator[Tile]:
        """The tiles of a block (of some groups)."""
        for group in groups or range(self.plan.groups):
            first = group * self.group_rows
            top, end = max(block.rows.start, first), min(block.rows.stop, first + self.group_rows)
            if top >= end:
                continue
            lines = end - top if self._by_rows else block.cols.stop - block.cols.start
            for cut in representatives(_cuts(lines, self._tile_lines), self.like):
                rows, cols = slice(top, end), block.cols
                if self._by_rows:
                    rows = slice(top + cut.start, top + cut.stop)
                else:
                    cols = slice(cols.start + cut.start, cols.start + cut.stop)
                yield Tile(group, rows, cols, slice(rows.start - first, rows.stop - first))

    def build(self, tile: Tile, keep: bool = False, out: Tensor | None = None) -> Tensor:
        with exact_products():
            return self.engines[tile.group].build(tile.own, tile.cols, keep, self._room(tile), out)

    def backward(self, tile: Tile, grad: Tensor) -> None:
        """Adds the gradient of the tile built last (with `keep`)."""
        with exact_products():
            self.engines[tile.group].backward(grad)

    def _room(self, tile: Tile) -> Tensor | None:
        if not self._slots:
            return None
        shape = self._slots, tile.rows.stop - tile.rows.start, tile.cols.stop - tile.cols.start
        count = shape[0] * shape[1] * shape[2]
        if self._pool is None or self._pool.numel() < count:
            self._pool = self.like.new_empty(count)
        return self._pool[:count].view(shape)

    def magnitude(self, tile: Tile, k: Tensor) -> Tensor:
        """|k| of a tile, in room of its own."""
        room = self._room(tile)
        return k.abs() if room is None else torch.abs(k, out=room[-1])

    def masks(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Two bool tensors shaped as a tile, in the room that its making has left."""
        if not self._slots or self._pool is None:
            return torch.empty_like(like, dtype=torch.bool), torch.empty_like(like, dtype=torch.bool)
        # |K| is in the last slot and K is no longer needed; engines keep the second slot for themselves.
        both = self._pool[like.numel() : 2 * like.numel()].view(torch.bool)
        return both[: like.numel()].view(like.shape), both[like.numel() : 2 * like.numel()].view(like.shape)

    def magnitudes(self, groups: range) -> Iterator[Tensor]:
        whole = Block(slice(0, self.out_features), slice(0, self.in_features))
        for tile in self.tiles(whole, groups):
            yield self.magnitude(tile, self.build(tile))

    def sample(self, groups: range) -> tuple[Tensor, int]:
        """|K| of evenly spaced elements, to guess from [n], and how many independent ones they are worth.

        Rows and columns differ much (a factor's row with a large norm), so patches that touch every row and every
        column with few elements each tell more than a sub-matrix does.
        """
        found, worth = [], 0
        for a, b, params in (self._parts[g] for g in groups):
            scalars = kernels.scalars(self._kernel, params)
            if self._by_rows and min(len(a), len(b)) >= 2 * PATCH:
                count = max(len(a), len(b)) // PATCH
                parts = _patches(a, count), _patches(b, count)
                k = self._kernel.merged(*parts, scalars)
                worth += k.numel()
            else:
                columns = a[:: max(len(a) // COLUMNS, 1)]
                k = self._kernel.merged(columns, b, scalars)
                worth += PATCH * len(columns)
            found.append(k.abs_().flatten())
        return torch.cat(found), worth

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """dL/da, dL/db, dL/dparams of the whole layer, over the tiles so far."""
        a, b, params = zip(*(engine.gradients() for engine in self.engines), strict=True)
        known = [p for p in params if p is not None]
        return torch.cat(a, 1), torch.cat(b, 0), torch.stack(known, 1) if known else None


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32 or bfloat16 inside float32 products: a distance in product form is a difference of near equals.

    The layer's own dense products keep what the user has set.
    """
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def representatives(cuts: Sequence[slice], like: Tensor) -> Sequence[slice]:
    """All cuts; of a meta tensor, which has no numbers, the first and the last: those between take what the first does.

    A matrix of 10^8 entries has hundreds of tiles.
    """
    return [cuts[0], cuts[-1]] if like.is_meta and len(cuts) > 2 else cuts


def _cuts(length: int, most: int) -> list[slice]:
    """range(length) in parts of nearly equal size, none longer than `most`."""
    parts = -(-length // most)
    return [slice(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


def _patches(factor: Tensor, count: int) -> Tensor:
    """[features, r] -> [count, PATCH, r]: each patch of rows spaced evenly, the patches taken in turn."""
    most = len(factor) // PATCH
    whole = factor[: most * PATCH].view(PATCH, most, -1).transpose(0, 1)
    return whole[torch.arange(count, device=factor.device) % most]
