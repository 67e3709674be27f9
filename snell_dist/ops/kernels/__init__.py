"""Kernels by file name: how two thin factors become one full-rank matrix.

A kernel is one file here. With a [in, r] and b [out, r] (segment h is a column slice) it declares

    SEGMENTS                     column slices of a factor; the rank must be a multiple of it
    PARAMS                       {name: start value} of its scalars, one of each per row group; may be empty
    merged(a, b, params)         K [out, in], differentiable by autograd: the definition
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

KERNELS = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


@cache
def find(name: str) -> Any:
    """The kernel module called `name`, one of KERNELS."""
    return importlib.import_module(f"{__name__}.{name}")
