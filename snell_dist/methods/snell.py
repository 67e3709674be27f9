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

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from snell_dist.methods import LinearMethod, check_rank

if TYPE_CHECKING:
    from torch import Tensor

    from snell_dist.adapted import AdaptedLinear
    from snell_dist.ops import ThresholdState


class Snell(LinearMethod):
    name: Literal["snell"]
    kernel: Literal["distance", "linear", "sigmoid", "rbf"] = Field("distance", description="table A6 of the paper")
    rank: int = Field(8, ge=1, description="columns of each factor; even for the distance kernel, which has two halves")
    sparsity: float = Field(
        0.9, ge=0, lt=1, description="fraction of each delta that is zero; 0: dense and not squared"
    )
    sparsify: Literal["released", "paper", "hard"] = Field(
        "released", description="what survivors become: w|w| (released code), equation 5's soft threshold, or w"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the delta's input (released code: 0.1; two more products)")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="of whole samples, on the delta's output (released code: 0.1)"
    )
    workspace_mib: float | None = Field(None, gt=0, description="temporary memory of a layer; null: one float32 matrix")

    @field_validator("rank")
    @classmethod
    def _even(cls, rank: int, info: ValidationInfo) -> int:
        if info.data.get("kernel") == "distance" and rank % 2:
            raise ValueError(f"must be even, since the distance kernel has two halves; nearest: {max(2, rank - 1)}")
        return rank

    def factors(self, in_features: int, out_features: int, groups: int) -> dict[str, Tensor]:
        import torch

        from snell_dist import ops
        from snell_dist.ops import kernels

        check_rank(self.rank, in_features, out_features // groups)
        a, b = ops.init_factors(in_features, out_features, self.rank, groups, kernel=self.kernel)
        scalars = {name: torch.full((groups,), start) for name, start in kernels.find(self.kernel).PARAMS.items()}
        return {"a": a, "b": b, **scalars}

    def memory(self) -> ThresholdState:
        from snell_dist import ops

        return ops.ThresholdState()

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        from snell_dist import ops

        return ops.snell_linear(
            x,
            layer.weight,
            layer.bias,
            dropout=self.dropout,
            drop_path=self.drop_path,
            training=layer.training,
            workspace_bytes=None if self.workspace_mib is None else int(self.workspace_mib * 2**20),
            state=layer.memory,
            **self._merged(layer),
        )

    def delta(self, layer: AdaptedLinear) -> Tensor:
        from snell_dist import ops

        return ops.merge_delta(**self._merged(layer))

    def _merged(self, layer: AdaptedLinear) -> dict[str, Any]:
        """What defines the delta of a layer."""
        names = [name for name in layer.factor_names if name not in "ab"]
        return {
            "a": layer.a,
            "b": layer.b,
            "sparsity": self.sparsity,
            "sparsify": self.sparsify,
            "kernel": self.kernel,
            "groups": layer.groups,
            "kernel_params": {name: layer.get_parameter(name) for name in names},
        }
