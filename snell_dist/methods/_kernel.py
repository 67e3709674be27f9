"""What the kernel methods share: factors merged by a kernel, the layer's product, and its merged weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from snell_dist.anatomy import Backbone, select_parts
from snell_dist.methods import LinearMethod, adapted_layers, add_into, check_rank

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snell_dist.adapted import AdaptedLinear
    from snell_dist.ops import ThresholdState


TWO_HALVES = "distance", "snella"


class KernelMethod(LinearMethod):
    kernel: str
    rank: int = Field(
        8, ge=1, description="columns of each factor; even for the distance kernels, which have two halves"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the delta's input (released code: 0.1; two more products)")
    dropout_on: list[str] = Field(
        ["*"], min_length=1, description="targets that drop (released code, in a ViT: q, k, v, fc1, fc2, but not proj)"
    )
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="of whole samples, on each delta's output (released code: 0.1)"
    )
    workspace_mib: float | None = Field(None, gt=0, description="temporary memory of a layer; null: one float32 matrix")

    @field_validator("rank")
    @classmethod
    def _even(cls, rank: int, info: ValidationInfo) -> int:
        if info.data.get("kernel") in TWO_HALVES and rank % 2:
            raise ValueError(f"must be even, since the distance kernel has two halves; nearest: {max(2, rank - 1)}")
        return rank

    def inject(self, backbone: Backbone) -> None:
        super().inject(backbone)
        chosen = select_parts(backbone.targets, self.dropout_on, backbone.blocks, "method.dropout_on")
        dropping = {target.layer for target in chosen}
        for name, layer in adapted_layers(backbone.model):
            if name not in dropping:
                layer.method = self.model_copy(update={"dropout": 0.0})

    def sparse(self, layer: AdaptedLinear) -> dict[str, Any]:
        """What the operator keeps of a layer's merged matrix: its arguments `sparsity` and `sparsify`."""
        raise NotImplementedError

    def factors(self, linear: nn.Linear, groups: int) -> dict[str, Tensor]:
        import torch

        from snell_dist import ops
        from snell_dist.ops import kernels

        check_rank(self.rank, linear.in_features, linear.out_features // groups)
        a, b = ops.init_factors(linear.in_features, linear.out_features, self.rank, groups, kernel=self.kernel)
        scalars = {name: torch.full((groups,), start) for name, start in kernels.find(self.kernel).PARAMS.items()}
        return {"a": a, "b": b, **scalars}

    def memory(self) -> Any:
        from snell_dist import ops

        return ops.ThresholdState()

    def thresholds(self, layer: AdaptedLinear) -> ThresholdState:
        return layer.memory

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        from snell_dist import ops

        apart = self.drop_path > 0 and layer.training and layer.groups > 1  # each row group has a fate of its own
        merges = layer.whole and layer.packing is None and not apart
        y = ops.snell_linear(
            x,
            layer.weight if merges else None,
            layer.bias if merges else None,
            dropout=self.dropout,
            drop_path=0.0 if apart else self.drop_path,
            training=layer.training,
            workspace_bytes=None if self.workspace_mib is None else int(self.workspace_mib * 2**20),
            state=self.thresholds(layer),
            **self._delta(layer),
        )
        if apart:
            y = ops.drop_paths(y, layer.groups, self.drop_path)
        return y if merges else layer.add(layer.frozen(x), y)

    def merged_weight(self, layer: AdaptedLinear) -> Tensor:
        from snell_dist import ops

        return add_into(ops.merge_delta(**self._delta(layer)), layer.rows(layer.dense))

    def _delta(self, layer: AdaptedLinear) -> dict[str, Any]:
        """What defines the delta of a layer."""
        scalars = [name for name in layer.factor_names if name not in "ab"]
        return {
            "a": layer.a,
            "b": layer.b,
            **self.sparse(layer),
            "kernel": self.kernel,
            "groups": layer.groups,
            "kernel_params": {name: layer.get_parameter(name) for name in scalars},
        }


class SparseKernelMethod(KernelMethod):
    sparsity: float
    sparsify: Literal["released", "paper", "hard"] = Field(
        "released", description="what survivors become: w|w| (released code), equation 5's soft threshold, or w"
    )

    def sparsity_of(self, layer: AdaptedLinear) -> float | Sequence[float]:
        """One for all row groups, or one for each."""
        return self.sparsity

    def sparse(self, layer: AdaptedLinear) -> dict[str, Any]:
        return {"sparsity": self.sparsity_of(layer), "sparsify": self.sparsify}
