"""The merged matrix K of one layer, a tile at a time, and the way back from a tile's gradient to the factors.

A tile lies within one row group. Kernels whose elements are independent are cut in row tiles [n, in]; one that
couples the out axis (SNELLA's softmax) in column tiles [out/groups, n].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from snell_dist.ops import kernels
from snell_dist.ops.plan import Plan

# Products of fewer rows are slower, and more rows bring nothing but memory.
MOST_ROWS = 768
SAMPLE = 192  # rows and columns of the sub-matrix that is looked at to guess a threshold


@dataclass(frozen=True)
class Tile:
    """Rows of the whole weight and columns of it; `own` are the same rows counted in their group."""

    group: int
    rows: slice
    cols: slice
    own: slice


class Engine(Protocol):
    """One group's kernel: tiles of K, and gradients added up over tiles."""

    def build(self, rows: slice, cols: slice, keep: bool) -> Tensor:
        """K [rows, cols]; the caller may overwrite it. With `keep`, what `backward` needs stays until then."""
        ...

    def backward(self, grad: Tensor) -> None:
        """Adds the gradient of the tile built last (with `keep`), given dL/dK, which may be overwritten."""
        ...

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """dL/da [in, rank], dL/db [out, rank], dL/dparams [scalars]."""
        ...


class GenericEngine:
    """Any kernel, through torch's own differentiation of its `merged` (by functions: autograd rests inside an op)."""

    def __init__(self, kernel: Any, a: Tensor, b: Tensor, params: Tensor | None) -> None:
        self._kernel = kernel
        self._inputs = (a, b) if params is None else (a, b, params)
        self._sums = [torch.zeros_like(t) for t in self._inputs]

    def build(self, rows: slice, cols: slice, keep: bool) -> Tensor:
        def merged(a: Tensor, b: Tensor, *params: Tensor) -> Tensor:
            return self._kernel.merged(a[cols], b[rows], kernels.scalars(self._kernel, *params))

        if not keep:
            return merged(*self._inputs)
        found: Any = torch.func.vjp(merged, *self._inputs)
        self._pull = found[1]
        return found[0].clone()

    def backward(self, grad: Tensor) -> None:
        self._sums = [s.add_(g) for s, g in zip(self._sums, self._pull(grad), strict=True)]
        del self._pull

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        a, b, *params = self._sums
        return a, b, params[0] if params else None


class Matrix:
    """The tiles of one layer: a [in, groups*rank], b [out, rank], params [scalars, groups]."""

    def __init__(self, a: Tensor, b: Tensor, params: Tensor | None, plan: Plan) -> None:
        self._kernel = kernels.find(plan.kernel)
        self.plan, self.out_features, self.in_features = plan, len(b), len(a)
        self.group_rows = len(b) // plan.groups
        self.like = b
        self._parts = [
            (one, two, None if params is None else params[:, g])
            for g, (one, two) in enumerate(zip(a.chunk(plan.groups, 1), b.chunk(plan.groups, 0), strict=True))
        ]
        make = getattr(self._kernel, "Engine", None)
        self.engines: list[Engine] = [
            GenericEngine(self._kernel, *part) if make is None else make(*part) for part in self._parts
        ]

    def tiles(self, groups: range | None = None) -> Iterator[Tile]:
        """All tiles (of some groups), small enough for the plan's workspace."""
        rows, cols = self.group_rows, self.in_features
        by_rows = self._kernel.AXIS == "rows"
        line, lines = (cols, rows) if by_rows else (rows, cols)
        line_bytes = max(line * self.like.element_size() * self._kernel.LIVE, 1)
        budget = self.plan.workspace or rows * cols * self.plan.groups * self.like.element_size()
        step = max(min(budget // line_bytes, MOST_ROWS, lines), 1)
        step = -(-lines // max(-(-lines // step), 1))  # tiles of equal size
        for group in groups or range(self.plan.groups):
            first = group * rows
            for start in range(0, lines, max(step, 1)):
                cut = slice(start, min(start + step, lines))
                own, columns = (cut, slice(0, cols)) if by_rows else (slice(0, rows), cut)
                yield Tile(group, slice(first + own.start, first + own.stop), columns, own)

    def build(self, tile: Tile, keep: bool = False) -> Tensor:
        return self.engines[tile.group].build(tile.own, tile.cols, keep)

    def magnitudes(self, groups: range) -> Iterator[Tensor]:
        for tile in self.tiles(groups):
            yield self.build(tile).abs_()

    def sample(self, groups: range) -> Tensor:
        """|K| of a sub-matrix of each group, evenly spaced, to guess from [n]."""
        found = []
        for a, b, params in (self._parts[g] for g in groups):
            scalars = kernels.scalars(self._kernel, params)
            if self._kernel.AXIS == "rows":
                b = b[:: max(len(b) // SAMPLE, 1)]
            a = a[:: max(len(a) * len(b) // SAMPLE**2, 1)]
            found.append(self._kernel.merged(a, b, scalars).abs().flatten())
        return torch.cat(found)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """dL/da, dL/db, dL/dparams of the whole layer, over the tiles so far."""
        a, b, params = zip(*(engine.gradients() for engine in self.engines), strict=True)
        known = [p for p in params if p is not None]
        return torch.cat(a, 1), torch.cat(b, 0), torch.stack(known, 1) if known else None
