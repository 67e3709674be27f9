"""Which device a meta tensor stands for.

A step is run on the meta device, where tensors have shapes and no numbers, to know what it would do elsewhere. Code
that goes one way on the CPU and another on a GPU asks here, and reads no value where `device.type` is meta.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_stands_for = ContextVar("stands_for", default="cuda")


@contextmanager
def standing_for(device_type: str) -> Iterator[None]:
    """Within, meta tensors stand for those of `device_type`; elsewhere for `cuda`."""
    token = _stands_for.set(device_type)
    try:
        yield
    finally:
        _stands_for.reset(token)


def kind(device: torch.device) -> str:
    """The type of the device whose ways a tensor there takes."""
    return _stands_for.get() if device.type == "meta" else device.type


def autocast_type(device: torch.device) -> str:
    """The device type whose autocast settings hold there, as torch takes it.

    The meta device has none of its own. It goes by the CPU's, since activation checkpointing renews those in any
    recomputation.
    """
    return "cpu" if device.type == "meta" else device.type
