"""Memory layouts of outputs, where torch's meta kernels say another than the devices write.

A copy in the next op depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._meta_registrations import (
    meta__scaled_dot_product_flash_attention,
    meta__scaled_dot_product_flash_attention_for_cpu,
    meta_conv,
)
from torch._prims_common import suggest_memory_format


def _tokens_first(made: Callable[..., Any], query: Tensor, *rest: Any, **options: Any) -> Any:
    """The first output [B, heads, N, D] as [B, N, heads, D] in memory, so that heads are joined by a view."""
    y, *others = made(query, *rest, **options)
    return torch.empty_like(y.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2), *others


def _convolution(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """Channels last where images or weight are, as cuDNN and oneDNN do."""
    last = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    y: Tensor = meta_conv(x, weight, *rest)
    return y.to(memory_format=torch.channels_last) if last else y


# kernels for the meta device, by the op's name
KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": partial(_tokens_first, meta__scaled_dot_product_flash_attention),
    "_scaled_dot_product_flash_attention_for_cpu": partial(
        _tokens_first, meta__scaled_dot_product_flash_attention_for_cpu
    ),
    "convolution": _convolution,
}
