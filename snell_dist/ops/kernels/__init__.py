"""Kernels by file name: how two thin factors become one full-rank matrix.

A kernel is one file here. With a [in, r] and b [out, r] (segment h is a column slice) it declares

    SEGMENTS               column slices of a factor; the rank must be a multiple of it
    PARAMS                 {name: start value} of its scalars, one of each per row group; may be empty
    DENSE_AT_ZERO          whether sparsity 0 means K itself, neither multiplied nor thresholded
    AXIS                   "rows" if any rows of K can be made alone, "columns" if columns can
    LIVE                   tiles of K's size that are alive at once in backward, for the workspace bound
    merged(a, b, params)   K [out, in], differentiable by autograd: the definition; a, b may carry a batch dimension
                           in front where AXIS is "rows"

and, where a gradient written by hand is faster, a class `Engine` (the protocol of that name in tiles.py).
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from torch import Tensor

KERNELS = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))
# All at once: a compiled caller can look into a dictionary and cannot import.
_FILES: dict[str, Any] = {name: importlib.import_module(f"{__name__}.{name}") for name in KERNELS}


def find(name: str) -> Any:
    """The kernel module called `name`, one of KERNELS."""
    return _FILES[name]


def scalars(kernel: Any, params: Tensor | None = None) -> dict[str, Tensor]:
    """One group's scalars by name, from the vector that holds them in the order of PARAMS."""
    return {} if params is None else dict(zip(kernel.PARAMS, params.unbind(), strict=True))
