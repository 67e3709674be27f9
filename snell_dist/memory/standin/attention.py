"""scaled_dot_product_attention of meta tensors by the kernel that a device would choose.

On meta torch takes the plain products, which keep the matrix of scores. What the fused kernels keep for backward
instead is their output and a number for each row of the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes

from snell_dist.memory.standin.casts import Cache

HALF = torch.float16, torch.bfloat16
ALIGNMENT = 8  # entries: of a flash kernel's heads, and of a row of the memory-efficient kernel's mask


class Kernel(Enum):
    MATH = "math"
    FLASH_CPU = "flash_attention_for_cpu"
    FLASH = "flash_attention"
    EFFICIENT = "efficient_attention"
    CUDNN = "cudnn_attention"


def attend(
    cache: Cache, choose: Callable[..., Kernel], query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch's scaled_dot_product_attention, of which this is the upper part. q, k, v [(B,) heads, N, D]."""
    aten = torch.ops.aten
    q, k, v, mask = cache.lowered((query, key, value, attn_mask))
    if q.is_meta and q.dim() == k.dim() == v.dim() == 3:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        while mask is not None and mask.dim() < 4:
            mask = mask.unsqueeze(0)
        batched = partial(attend, cache, choose, scale=scale, enable_gqa=enable_gqa)
        return batched(q, k, v, mask, dropout_p, is_causal).squeeze(0)
    plain = not q.is_meta or q.dim() != 4 or enable_gqa
    kernel = Kernel.MATH if plain else choose(q, k, v, mask, dropout_p, is_causal)
    if kernel == Kernel.MATH:
        given = q, k, v, mask, dropout_p, is_causal
        made: Tensor = aten.scaled_dot_product_attention(*given, scale=scale, enable_gqa=enable_gqa)
        return made
    mask = None if mask is None else _additive(mask, q.dtype)
    keeps = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if kernel == Kernel.FLASH_CPU:
        flash = partial(aten._scaled_dot_product_flash_attention_for_cpu, attn_mask=mask, scale=scale)
        y, *_ = flash(q, k, v, dropout_p, is_causal)
    elif kernel == Kernel.FLASH:
        width = q.shape[-1]
        padded = [F.pad(x, (0, -width % ALIGNMENT)) if width % ALIGNMENT else x for x in (q, k, v)]
        scale = width**-0.5 if scale is None else scale
        y, *_ = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)
        y = y[..., :width] if width % ALIGNMENT else y
    elif kernel == Kernel.EFFICIENT:
        mask = None if mask is None else _aligned(mask).expand(*q.shape[:3], k.shape[2])
        y, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, mask, keeps, dropout_p, is_causal, scale=scale)
    else:
        cudnn = aten._scaled_dot_product_cudnn_attention
        y, *_ = cudnn(q, k, v, mask, keeps, dropout_p, is_causal, False, scale=scale)
    return y


def cpu_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> Kernel:
    """torch's own choice on the CPU."""
    likes = tuple((x.shape, x.stride(-1)) for x in (q, k, v))
    masked = None if mask is None else (mask.shape, mask.requires_grad)
    return _cpu_kernel(likes, q.dtype, masked, dropout, causal)


@lru_cache(maxsize=4096)
def _cpu_kernel(
    likes: tuple[tuple[torch.Size, int], ...], dtype: torch.dtype, masked: tuple[torch.Size, bool] | None,
    dropout: float, causal: bool,
) -> Kernel:  # fmt: skip
    """Of q, k, v by shape and last stride, and a mask by shape and whether it trains."""
    choose: Any = torch._fused_sdp_choice
    with _disable_current_modes():
        # as large, but in no more memory than a row
        made = [
            torch.empty(shape[-1] * max(stride, 1), dtype=dtype, device="cpu").as_strided(shape, (0, 0, 0, stride))
            for shape, stride in likes
        ]
        mask = None
        if masked is not None:
            mask = torch.empty((), dtype=dtype, device="cpu").expand(masked[0]).requires_grad_(masked[1])
        choice = choose(*made, mask, dropout, causal)
    return Kernel.FLASH_CPU if choice == SDPBackend.FLASH_ATTENTION.value else Kernel.MATH


def cuda_kernel(
    capability: tuple[int, int], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> Kernel:
    """What torch chooses on an NVIDIA GPU of this compute capability where the user has forbidden no kernel."""
    width, half, major = q.shape[-1], q.dtype in HALF, capability[0]
    batched = q.shape[:2] == k.shape[:2] == v.shape[:2] and min(q.shape[2], k.shape[2]) > 0
    if not batched or any(x.stride(-1) != 1 for x in (q, k, v)):
        return Kernel.MATH
    square = q.shape[2] == k.shape[2]
    flash = major >= 8 and half and k.shape[-1] == v.shape[-1] == width
    hopper = major in (9, 10) and width <= 128 and width % 8 == 0 and k.shape[2] > 1 and not dropout
    if flash and hopper and not (mask is not None and mask.requires_grad):
        return Kernel.CUDNN
    if flash and width <= 256 and mask is None and (square or not causal):
        return Kernel.FLASH
    # what tensor cores multiply, and which they have
    aligned = 8 if half and major >= 7 else 4 if major >= 8 else 1
    known = q.dtype in (torch.float16, torch.float32) or (q.dtype == torch.bfloat16 and major >= 8)
    if known and k.shape[-1] == width and width % aligned == 0 and v.shape[-1] % aligned == 0:
        return Kernel.EFFICIENT
    return Kernel.MATH


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that says what to keep as one that is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    zero, never = (torch.scalar_tensor(score, dtype=dtype, device=mask.device) for score in (0.0, -torch.inf))
    return torch.where(mask, zero, never)


def _aligned(mask: Tensor) -> Tensor:
    """The mask with rows that begin at multiples of ALIGNMENT, a copy if they do not yet."""
    if mask.stride(-1) == 1 and all(stride % ALIGNMENT == 0 for stride in mask.stride()[:-1]):
        return mask
    length = mask.shape[-1]
    return F.pad(mask, (0, ALIGNMENT - length % ALIGNMENT))[..., :length]
