"""LoRA (Hu et al., 2021): a low-rank delta; with its kin rsLoRA (Kalajdzievski, 2023) and DoRA (Liu et al., 2024).

    y = x W0^T + bias + s (x a) b^T,  s = alpha / r  (rsLoRA: alpha / sqrt r)

    a [in, r] -> b [out, r] -> delta = s b a^T, of rank r

DoRA: each row of W0 + delta is scaled to a trained length m [out, 1], which starts at the row's own.

Parameters: r (in + out) a matrix, DoRA out more. Memory: x a, [tokens, r], besides what the frozen layer keeps;
DoRA also W0 + delta, for its row norms. The delta is zero at the start (b = 0), as in PEFT, unless `init: released`:
the paper's code overwrites b with a truncated normal, so its LoRA does not start at the pretrained model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from snell_dist.methods import LinearMethod, add_into, check_rank

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snell_dist.adapted import AdaptedLinear

RELEASED_STD = 0.02


class Lora(LinearMethod):
    name: Literal["lora"]
    about: ClassVar[str] = "LoRA: a low-rank delta; also rsLoRA and DoRA"
    rank: int = Field(8, ge=1, description="columns of each factor")
    alpha: float | None = Field(None, gt=0, description="numerator of the delta's scale; null: alpha = rank")
    scaling: Literal["standard", "rslora"] = Field("standard", description="alpha / rank, or alpha / sqrt(rank)")
    dora: bool = Field(False, description="train the length of each row of the weight, too")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the delta's input")
    init: Literal["zero", "released"] = Field("zero", description="the delta at the start; released: the paper's code")

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "standard" else self.rank**0.5)

    def factors(self, linear: nn.Linear, groups: int) -> dict[str, Tensor]:
        import torch
        from torch.nn.init import trunc_normal_

        check_rank(self.rank, linear.in_features, linear.out_features // groups)
        a = torch.empty(linear.in_features, groups * self.rank)
        b = torch.zeros(linear.out_features, self.rank)
        if self.init == "released":
            trunc_normal_(a, std=RELEASED_STD)
            trunc_normal_(b, std=RELEASED_STD)
        else:
            bound = linear.in_features**-0.5  # kaiming_uniform(a=sqrt 5), as nn.Linear and PEFT
            a.uniform_(-bound, bound)
        return {"a": a, "b": b} | ({"m": _lengths(linear.weight.float())} if self.dora else {})

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        import torch
        from torch.nn import functional as F

        y, dropped = layer.frozen(x), F.dropout(x, self.dropout, layer.training)
        low = (dropped.to(layer.a.dtype) @ layer.a).unflatten(-1, (layer.groups, self.rank))
        b = layer.b.unflatten(0, (layer.groups, -1))
        delta = self.scale * _cat([low[..., g, :] @ b[g].t() for g in range(layer.groups)])
        if self.dora:
            with torch.no_grad():
                weight = add_into(self._delta(layer), layer.rows(layer.dense))
            ratio, base = self._ratio(layer, weight), F.linear(x, layer.rows(layer.dense))
            delta = (ratio - 1) * base + ratio * delta
        return layer.add(y, delta)

    def merged_weight(self, layer: AdaptedLinear) -> Tensor:
        weight = add_into(self._delta(layer), layer.rows(layer.dense))
        return weight.mul_(self._ratio(layer, weight).unsqueeze(1)) if self.dora else weight

    def _delta(self, layer: AdaptedLinear) -> Tensor:
        a = layer.a.unflatten(1, (layer.groups, self.rank))
        b = layer.b.unflatten(0, (layer.groups, -1))
        return (b @ a.permute(1, 2, 0)).flatten(0, 1).mul_(self.scale)

    def _ratio(self, layer: AdaptedLinear, weight: Tensor) -> Tensor:
        """[out]: trained length over present length, which is a constant to the gradient (section 4.3 of DoRA)."""
        return (layer.get_parameter("m") / _lengths(weight)).squeeze(1)


def _lengths(weight: Tensor) -> Tensor:
    """[out, in] to the Euclidean lengths of its rows [out, 1]."""
    return weight.norm(dim=1, keepdim=True)


def _cat(parts: list[Tensor]) -> Tensor:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
