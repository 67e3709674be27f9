"""SNELL: sparse tuning with kernelized LoRA (NeurIPS 2024).

    K_oi  = 0.1 ||b1_o - a1_i|| - 0.1 ||b2_o - a2_i||        two thin factors, merged by a nonlinear kernel
    delta = K |K| where |K| > t, else 0                      t: the `sparsity` quantile of |K| in the matrix
    y     = x (W0 + delta)^T + bias

    a [in, r] ---\\                 keep the largest
                  > kernel > K [out, in] ----> delta [out, in] + W0 (frozen)
    b [out, r] --/   full rank

Parameters: r (in + out) a matrix, LoRA's. Memory: LoRA's, and one delta at a time, rebuilt in backward.
The delta is not zero at the start, so an adapted model differs from the pretrained one before step 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from snell_dist.methods import LinearMethod, check_rank

if TYPE_CHECKING:
    from torch import Tensor

    from snell_dist.adapted import AdaptedLinear
    from snell_dist.ops import ThresholdState


class Snell(LinearMethod):
    name: Literal["snell"]
    rank: int = Field(8, ge=2, description="columns of each factor; even, since the kernel uses two halves")
    sparsity: float = Field(
        0.9, ge=0, lt=1, description="fraction of each delta that is zero; 0: dense and not squared"
    )
    sparsify: Literal["released", "paper", "hard"] = Field(
        "released", description="what survivors become: w|w| (released code), equation 5's soft threshold, or w"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the delta's input (released code: 0.1; one more product)")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="of whole samples, on the delta's output (released code: 0.1)"
    )

    @field_validator("rank")
    @classmethod
    def _even(cls, rank: int) -> int:
        if rank % 2:
            raise ValueError(f"must be even, since the kernel has two halves; nearest: {rank - 1} or {rank + 1}")
        return rank

    def factors(self, in_features: int, out_features: int, groups: int) -> dict[str, Tensor]:
        from snell_dist import ops

        check_rank(self.rank, in_features, out_features // groups)
        a, b = ops.init_factors(in_features, out_features, self.rank, groups)
        return {"a": a, "b": b}

    def memory(self) -> ThresholdState:
        from snell_dist import ops

        return ops.ThresholdState()

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        from snell_dist import ops

        return ops.snell_linear(
            x,
            layer.weight,
            layer.bias,
            layer.a,
            layer.b,
            sparsity=self.sparsity,
            sparsify=self.sparsify,
            groups=layer.groups,
            dropout=self.dropout,
            drop_path=self.drop_path,
            training=layer.training,
            state=layer.memory,
        )

    def delta(self, layer: AdaptedLinear) -> Tensor:
        from snell_dist import ops

        return ops.merge_delta(layer.a, layer.b, sparsity=self.sparsity, sparsify=self.sparsify, groups=layer.groups)
