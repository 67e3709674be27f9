"""Kernels: how two thin factors become a full-rank matrix. One file a kernel, found by its name.

A kernel's file says
    SEGMENTS           the factor's columns come in so many equal slices
    SCALARS            start values of its trained scalars, by name ({} for none)
    DENSE_AT_ZERO      whether sparsity 0 means the kernel's matrix itself, neither squared nor thresholded
    ROWS_INDEPENDENT   whether rows of the matrix can be made tile by tile
    merged(a, b, scalars) -> K [out, in]     differentiable; a [in, rank], b [out, rank], scalars [n] or None

and, where its gradient is worth writing by hand, a class `Tiles` like `AutogradTiles` below.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

KERNELS = sorted(f.stem for f in Path(__file__).parent.glob("*.py") if not f.stem.startswith("_"))


class TilesLike(Protocol):
    """Makes rows of K, and turns a gradient to them into gradients of the factors."""

    def merge(self, b: Tensor, keep: bool) -> tuple[Tensor, Any]:
        """Rows of K for rows of b [n, rank], and, to `keep`, what the gradient needs."""
        ...

    def gradient(self, grad: Tensor, kept: Any) -> Tensor:
        """From dL/dK of those rows to dL/db of them. dL/da and dL/dscalars add up inside."""
        ...

    def sums(self) -> tuple[Tensor, Tensor | None]:
        """dL/da [in, rank] and dL/dscalars, over all tiles so far."""
        ...


class AutogradTiles:
    """Tiles of any kernel, by torch's own differentiation of `merged`."""

    def __init__(self, kernel: ModuleType, a: Tensor, scalars: Tensor | None) -> None:
        self._kernel = kernel
        self._a = a.detach().requires_grad_()
        self._scalars = None if scalars is None else scalars.detach().requires_grad_()
        self._sum_a = torch.zeros_like(a)
        self._sum_scalars = None if scalars is None else torch.zeros_like(scalars)

    def merge(self, b: Tensor, keep: bool) -> tuple[Tensor, Any]:
        with torch.set_grad_enabled(keep):
            b = b.detach().requires_grad_()
            k = self._kernel.merged(self._a, b, self._scalars)
        return k.detach(), (k, b) if keep else None

    def gradient(self, grad: Tensor, kept: Any) -> Tensor:
        k, b = kept
        inputs = [b, self._a] if self._scalars is None else [b, self._a, self._scalars]
        grad_b, grad_a, *grad_scalars = torch.autograd.grad(k, inputs, grad)
        self._sum_a += grad_a
        if self._sum_scalars is not None:
            self._sum_scalars += grad_scalars[0]
        return grad_b

    def sums(self) -> tuple[Tensor, Tensor | None]:
        return self._sum_a, self._sum_scalars


def find(name: str) -> ModuleType:
    """The kernel's file; ValueError with the nearest name where there is none."""
    if name not in KERNELS:
        near = difflib.get_close_matches(name, KERNELS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"kernel = {name!r}: unknown{hint} (allowed: {', '.join(KERNELS)})")
    return import_module(f"{__name__}.{name}")


def tiles_of(kernel: ModuleType, a: Tensor, scalars: Tensor | None) -> TilesLike:
    """The kernel's own tiles, or autograd's."""
    return getattr(kernel, "Tiles", AutogradTiles)(kernel, a, scalars)
