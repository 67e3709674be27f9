"""Bottleneck adapters (Houlsby et al., 2019): a small network behind a frozen layer.

    h = x W0^T + bias
    y = h + up(gelu(down(h)))

    h [out] -> down [r] -> gelu -> up [out] -> + h

Parameters: 2 r out + r + out a layer; by default one adapter a block, behind the MLP. Memory: h and the bottleneck.
It starts as the identity (up = 0), unless `init: released`: the paper's code overwrites up with a truncated normal.
No weight can hold it, so it cannot be merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from snell_dist.methods import LinearMethod, check_rank

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snell_dist.adapted import AdaptedLinear

RELEASED_STD = 0.02


class Adapter(LinearMethod):
    name: Literal["adapter"]
    about: ClassVar[str] = "bottleneck adapters behind frozen layers"
    mergeable: ClassVar[bool] = False
    targets: list[str] = Field(["fc2"], min_length=1, description="linear layers that get an adapter behind them")
    rank: int = Field(8, ge=1, description="width of the bottleneck")
    init: Literal["zero", "released"] = Field("zero", description="up at the start; released: the paper's code")

    def factors(self, linear: nn.Linear, groups: int) -> dict[str, Tensor]:
        import torch
        from torch.nn.init import trunc_normal_

        out = linear.out_features
        check_rank(self.rank, out, out)
        down, up = trunc_normal_(torch.empty(out, self.rank), std=RELEASED_STD), torch.zeros(out, self.rank)
        if self.init == "released":
            trunc_normal_(up, std=RELEASED_STD)
        return {"down": down, "down_bias": torch.zeros(self.rank), "up": up, "up_bias": torch.zeros(out)}

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        from torch.nn import functional as F

        y = layer.frozen(x)
        down, down_bias, up, up_bias = (layer.get_parameter(name) for name in layer.factor_names)
        h = layer.columns(y).to(down.dtype)
        return layer.add(y, F.linear(F.gelu(F.linear(h, down.t(), down_bias)), up, up_bias))
