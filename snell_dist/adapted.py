"""The adapted linear layer: an nn.Linear that owns its frozen weight and a method's factors.

It replaces the layer instead of wrapping it, so the backbone's state-dict keys stay what timm and
open_clip made them, and sharded engines gather weight and factors together around this forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snell_dist.packed import Kind, Packing, pack, plain


class Delta(Protocol):
    """What the layer asks of its method; see `methods.LinearMethod`."""

    mergeable: ClassVar[bool]

    @property
    def name(self) -> str: ...

    def factors(self, linear: nn.Linear, groups: int) -> dict[str, Tensor]: ...

    def buffers(self, linear: nn.Linear, groups: int) -> dict[str, Tensor]: ...

    def memory(self) -> Any: ...

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor: ...

    def merged_weight(self, layer: AdaptedLinear) -> Tensor: ...


class RowGroups:
    """Which of the equal row groups of a weight [out, in] are adapted: those numbered `adapted`, of `parts`."""

    parts: int
    adapted: tuple[int, ...]

    @property
    def groups(self) -> int:
        return len(self.adapted)

    @property
    def whole(self) -> bool:
        """Whether every row of the weight is adapted."""
        return self.groups == self.parts

    def rows(self, weight: Tensor) -> Tensor:
        """The adapted rows [groups * out / parts, ...] of a tensor [out, ...]."""
        if self.whole:
            return weight
        pieces = weight.chunk(self.parts)
        return torch.cat([pieces[i] for i in self.adapted])

    def with_rows(self, weight: Tensor, rows: Tensor) -> Tensor:
        """The tensor [out, ...] with its adapted rows replaced."""
        if self.whole:
            return rows
        pieces = list(weight.chunk(self.parts))
        for i, piece in zip(self.adapted, rows.chunk(self.groups), strict=True):
            pieces[i] = piece
        return torch.cat(pieces)

    def columns(self, y: Tensor) -> Tensor:
        """The adapted columns [..., groups * out / parts] of y [..., out]."""
        if self.whole:
            return y
        pieces = y.chunk(self.parts, -1)
        return torch.cat([pieces[i] for i in self.adapted], -1)

    def add(self, y: Tensor, delta: Tensor) -> Tensor:
        """y [..., out] plus delta [..., groups * out / parts] in the adapted columns, in y's dtype."""
        if self.whole:
            return y + delta.to(y.dtype)
        pieces = list(y.chunk(self.parts, -1))
        for i, piece in zip(self.adapted, delta.chunk(self.groups, -1), strict=True):
            pieces[i] = pieces[i] + piece.to(y.dtype)
        return torch.cat(pieces, -1)


class AdaptedLinear(RowGroups, nn.Linear):
    """`linear` with the delta of `method`; weight [out, in] and bias [out] are the same Parameter objects.

    The weight has `parts` equal row groups (3 for a fused qkv). Those in `adapted`, all by default, are adapted as
    matrices of their own; `groups` is their number. The factors are 2-D parameters of this module, named as
    `method.factors` names them; what a method remembers and must be saved is a buffer, named by `method.buffers`.
    """

    a: nn.Parameter  # [in, groups * rank]
    b: nn.Parameter  # [groups * out / parts, rank]

    def __init__(self, linear: nn.Linear, method: Delta, parts: int = 1, adapted: Sequence[int] | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.method, self.parts = method, parts
        self.adapted = tuple(range(parts)) if adapted is None else tuple(adapted)
        self.memory = method.memory()
        self.packing: Packing | None = None
        rows = self.rows(self.weight.detach())
        chosen = nn.Linear(self.in_features, len(rows), bias=False, device="meta")
        chosen.weight = nn.Parameter(rows, requires_grad=False)
        factors, buffers = method.factors(chosen, self.groups), method.buffers(chosen, self.groups)
        self.factor_names, self.buffer_names = tuple(factors), tuple(buffers)
        for name, factor in factors.items():
            # Factors stay float32 beside a half-precision weight: they are small, and they train.
            self.register_parameter(name, nn.Parameter(factor.to(self.weight.device)))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.to(self.weight.device))

    @property
    def mergeable(self) -> bool:
        return self.method.mergeable

    @property
    def dense(self) -> Tensor:
        """W0 [out, in], float32 where it is packed."""
        return self.weight if self.packing is None else self.packing.dense(self.weight, torch.float32)

    def pack(self, kind: Kind) -> None:
        """Stores the frozen weight in fewer bits."""
        self.weight, self.packing = pack(self.weight, kind)

    def frozen(self, x: Tensor) -> Tensor:
        """x W0^T + bias, [..., out]."""
        if self.packing is not None:
            return self.packing.product(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        return self.method.forward(self, x)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain nn.Linear with the delta in its weight, in the weight's dtype; float32 where it is packed."""
        dense = self.dense
        return plain(self.with_rows(dense, self.method.merged_weight(self).to(dense.dtype)), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method.name}, adapted={self.groups} of {self.parts}"
