"""Frozen matrices in 8 or 4 bits, by bitsandbytes: the entries of a block share a scale (NF4: QLoRA, 2023).

    y = x dense(W0)^T + bias

W0 is made dense for each product, forward and backward, in the product's dtype, and not kept. Memory: 1 or 1/2 byte
an entry and 4 bytes a block, and one dense matrix while its product runs.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from snell_dist.config import ConfigError, Problem
from snell_dist.standing import autocast_type

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

Kind = Literal["int8", "nf4"]
BLOCK = 64


class Packing(nn.Module):
    """Scales [entries / BLOCK] and code table of a packed weight. `pack` makes it."""

    absmax: Tensor
    code: Tensor

    def __init__(self, kind: Kind, shape: torch.Size, state: QuantState) -> None:
        super().__init__()
        self.kind, self.shape = kind, shape
        self.register_buffer("absmax", state.absmax)
        self.register_buffer("code", state.code)

    def dense(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """[out, in]."""
        functional = _functional()
        state = functional.QuantState(
            self.absmax, shape=self.shape, code=self.code, blocksize=BLOCK, quant_type=self.kind, dtype=torch.float32
        )
        unpack = functional.dequantize_4bit if self.kind == "nf4" else functional.dequantize_blockwise
        return unpack(weight, state).to(dtype)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] to [..., out]."""
        kind = autocast_type(x.device)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _Product.apply(x.to(dtype), weight, self)
        return y if bias is None else y + bias.to(dtype)


class PackedLinear(nn.Linear):
    """A frozen layer that nothing adapts, packed."""

    def __init__(self, linear: nn.Linear, kind: Kind) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.weight, self.packing = pack(linear.weight, kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.packing.product(x, self.weight, self.bias)

    def merged(self) -> nn.Linear:
        """A plain layer, in float32."""
        return plain(self.packing.dense(self.weight, torch.float32), self.bias)


def pack(weight: Tensor, kind: Kind) -> tuple[nn.Parameter, Packing]:
    """The packed entries, and what they need to become [out, in] again."""
    functional, dense = _functional(), weight.detach().float().contiguous()
    if kind == "nf4":
        packed, state = functional.quantize_4bit(dense, blocksize=BLOCK, quant_type=kind)
    else:
        packed, state = functional.quantize_blockwise(dense, blocksize=BLOCK)
    return nn.Parameter(packed, requires_grad=False), Packing(kind, weight.shape, state)


def plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear of this weight [out, in], and the very bias."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias  # type: ignore[assignment]
    return linear


class _Product(torch.autograd.Function):
    """Keeps the packed weight for backward, and not the dense one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packing: Packing) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.packing = packing
        return x @ packing.dense(weight, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *up: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return up[0] @ ctx.packing.dense(weight, up[0].dtype), None, None


def bitsandbytes(key: str) -> Any:
    """The library that the setting `key` asks for. ConfigError where it is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a CPU kernel on the hub, which is not used
    try:
        import bitsandbytes as library
    except ImportError:
        message = "needs bitsandbytes, which is missing: pip install 'snell_dist[quantized]'"
        raise ConfigError(Problem(key, message)) from None
    return library


def _functional() -> Any:
    return bitsandbytes("precision.frozen").functional
