"""Kernels and casts of another device for meta tensors, so that a step on meta books what the device would.

Three things are decided by a tensor's device above autograd, and go another way on meta: autocast's casts (casts.py),
the kernel of scaled_dot_product_attention (attention.py), and dropout's. They are put in as kernels of a dispatch key
that no device here uses and that comes where autocast's do, so composite functions of Python and C++ meet them as on
the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKeySet, _ExcludeDispatchKeyGuard, _IncludeDispatchKeyGuard
from torch.library import _scoped_library, fallthrough_kernel

from snell_dist import standing
from snell_dist.memory.standin import attention, casts, layouts

DEVICE = "ipu"  # whose autocast this takes the place of
KEY: Any = torch._C.DispatchKey.AutocastIPU  # type: ignore[attr-defined]
AMPERE = (8, 0)


@contextmanager
def standing_for(device_type: str, capability: tuple[int, int] = AMPERE) -> Iterator[None]:
    """Within, meta tensors take the kernels and casts that tensors of `device_type` (cpu or cuda) would.

    Autocast on meta is torch's CPU autocast (`standing.autocast_type`), by the op lists of `device_type`.
    capability: the GPU's compute capability, on which the choice among its attention kernels depends.
    """
    choose = attention.cpu_kernel if device_type == "cpu" else partial(attention.cuda_kernel, capability)
    with ExitStack() as stack:
        stack.enter_context(standing.standing_for(device_type))
        stack.enter_context(_scoped_library("_", "IMPL")).fallback(fallthrough_kernel, KEY.name)
        kernels = stack.enter_context(_scoped_library("aten", "IMPL"))
        cache = stack.enter_context(casts.Cache().dropped_with_autocast())
        for name, call in casts.calls(device_type, cache).items():
            kernels.impl(name, partial(_below, call), KEY.name)
        attend = partial(attention.attend, cache, choose)
        kernels.impl("scaled_dot_product_attention", partial(_below, attend), KEY.name)
        if device_type == "cuda":
            kernels.impl("dropout", partial(_below, _dropout), KEY.name)
        for name, made in layouts.KERNELS.items():
            kernels.impl(name, made, "Meta", allow_override=True)
        stack.callback(torch.set_autocast_enabled, DEVICE, torch.is_autocast_enabled(DEVICE))
        torch.set_autocast_enabled(DEVICE, True)  # else the key stays excluded
        stack.enter_context(_IncludeDispatchKeyGuard(KEY))
        yield


def as_on(device_type: str, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Has an optimizer of meta tensors go as torch's do by default on a device: on GPUs over all tensors at once."""
    for group in optimizer.param_groups:
        if "foreach" in group:
            group["foreach"] = device_type == "cuda"
    return optimizer


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """torch's, which on a GPU keeps a mask of bytes for backward and not of x's dtype."""
    if x.is_meta and train and 0 < p < 1 and x.numel():
        y: Tensor = torch.native_dropout(x, p, train)[0]
        return y
    dropped: Tensor = torch.ops.aten.dropout(x, p, train)
    return dropped


def _below(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with _ExcludeDispatchKeyGuard(DispatchKeySet(KEY)):
        return call(*args, **options)
