"""Mixed precision, decided once: what the frozen base is stored in, and what products are computed in.

What trains, its gradients and the optimizer's state stay float32, and so do SNELL's kernels and thresholds,
norms and losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationInfo, field_validator

from snell_dist.config import Section

if TYPE_CHECKING:
    import torch
    from torch import nn


class Precision(Section):
    compute: Literal["float32", "bfloat16", "float64"] = Field(
        "float32", description="of matrix products; bfloat16: autocast; float64: everything, to check with"
    )
    frozen: Literal["float32", "bfloat16", "int8", "nf4"] = Field(
        "float32", description="how frozen matrices are stored; int8 and nf4 (4 bits): those of linear layers"
    )

    @field_validator("frozen")
    @classmethod
    def _fits(cls, frozen: str, info: ValidationInfo) -> str:
        compute = info.data.get("compute")
        if frozen == "bfloat16" and compute != "bfloat16":
            raise ValueError("needs compute: bfloat16, since products take one dtype")
        if frozen in ("int8", "nf4") and compute == "float64":
            raise ValueError("does not go with compute: float64, which is to check with")
        return frozen

    def autocast(self, device: torch.device) -> AbstractContextManager:
        import torch

        from snell_dist.standing import autocast_type

        return torch.autocast(autocast_type(device), torch.bfloat16, enabled=self.compute == "bfloat16")


def apply(precision: Precision, model: nn.Module, trainable: Iterable[str]) -> None:
    """Stores frozen matrices as the policy says, in place; what trains, and every vector and token, is float32.

    Raises ConfigError where the policy needs a library that is missing.
    """
    import torch
    from torch import nn

    from snell_dist.adapted import AdaptedLinear
    from snell_dist.packed import PackedLinear

    kind = precision.frozen if precision.frozen in ("int8", "nf4") else None
    wide = torch.float64 if precision.compute == "float64" else torch.float32
    dtype = wide if precision.frozen == "float32" else getattr(torch, precision.compute)
    matrices = nn.Linear, nn.Conv2d, nn.Embedding
    first = {id(parameter): name for name, parameter in model.named_parameters()}  # a shared one has many names
    trains = set(trainable)
    for path, module in list(model.named_modules()):
        for name, parameter in module.named_parameters(recurse=False):
            stored = isinstance(module, matrices) and name == "weight" and first[id(parameter)] not in trains
            if stored and kind and isinstance(module, AdaptedLinear):
                module.pack(kind)
            elif stored and kind and type(module) is nn.Linear:
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, PackedLinear(module, kind))
            else:
                parameter.data = parameter.data.to(dtype if stored else wide)
