"""LoRA (Hu et al., 2021): a low-rank delta.

    y = x W0^T + bias + (alpha / r) (x a) b^T

    a [in, r] -> b [out, r] -> delta = (alpha / r) b a^T, of rank r

Parameters: r (in + out) a matrix. Memory: x a, [tokens, r], besides what the frozen layer keeps.
The delta is zero at the start (b = 0), as in PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from snell_dist.methods import LinearMethod, check_rank

if TYPE_CHECKING:
    from torch import Tensor

    from snell_dist.adapted import AdaptedLinear


class Lora(LinearMethod):
    name: Literal["lora"]
    rank: int = Field(8, ge=1, description="columns of each factor")
    alpha: float | None = Field(None, gt=0, description="the delta is scaled by alpha / rank; null: alpha = rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the delta's input")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self, in_features: int, out_features: int, groups: int) -> dict[str, Tensor]:
        import torch

        check_rank(self.rank, in_features, out_features // groups)
        bound = in_features**-0.5  # kaiming_uniform(a=sqrt 5), as nn.Linear and PEFT
        a = torch.empty(in_features, groups * self.rank).uniform_(-bound, bound)
        return {"a": a, "b": torch.zeros(out_features, self.rank)}

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        from torch.nn import functional as F

        y = F.linear(x, layer.weight, layer.bias)
        x = F.dropout(x, self.dropout, layer.training)
        low = (x.to(layer.a.dtype) @ layer.a).unflatten(-1, (layer.groups, self.rank))
        b = layer.b.unflatten(0, (layer.groups, -1))
        deltas = [low[..., g, :] @ b[g].t() for g in range(layer.groups)]
        return y + (self.scale * _cat(deltas)).to(y.dtype)

    def delta(self, layer: AdaptedLinear) -> Tensor:
        a = layer.a.unflatten(1, (layer.groups, self.rank))
        b = layer.b.unflatten(0, (layer.groups, -1))
        return self.scale * (b @ a.permute(1, 2, 0)).flatten(0, 1)


def _cat(parts: list[Tensor]) -> Tensor:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
