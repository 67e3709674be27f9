"""The adapted linear layer: an nn.Linear that owns its frozen weight and a method's factors.

It replaces the layer instead of wrapping it, so the backbone's state-dict keys stay what timm and
open_clip made them, and sharded engines gather weight and factors together around this forward.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Delta(Protocol):
    """What the layer asks of its method; see `methods.LinearMethod`."""

    @property
    def name(self) -> str: ...

    def factors(self, in_features: int, out_features: int, groups: int) -> dict[str, Tensor]: ...

    def memory(self) -> Any: ...

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor: ...

    def delta(self, layer: AdaptedLinear) -> Tensor: ...


class AdaptedLinear(nn.Linear):
    """`linear` with the delta of `method`; weight [out, in] and bias [out] are the same Parameter objects.

    `groups` equal row slices of the weight (3 for a fused qkv) are adapted as matrices of their own.
    The factors are 2-D parameters of this module, named as `method.factors` names them.
    """

    a: nn.Parameter  # [in, groups * rank]
    b: nn.Parameter  # [out, rank]

    def __init__(self, linear: nn.Linear, method: Delta, groups: int = 1) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.method, self.groups = method, groups
        self.memory = method.memory()
        factors = method.factors(self.in_features, self.out_features, groups)
        self.factor_names = tuple(factors)
        for name, factor in factors.items():
            # Factors stay float32 beside a half-precision weight: they are small, and they train.
            self.register_parameter(name, nn.Parameter(factor.to(self.weight.device)))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        return self.method.forward(self, x)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain nn.Linear with the delta folded into its weight, in the weight's dtype."""
        result = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = (self.weight + self.method.delta(self)).to(self.weight.dtype)
        result.weight, result.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method.name}, groups={self.groups}"
