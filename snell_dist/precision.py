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
    compute: Literal["float32", "bfloat16"] = Field("float32", description="of matrix products (autocast)")
    frozen: Literal["float32", "bfloat16"] = Field("float32", description="how the frozen matrices are stored")

    @field_validator("frozen")
    @classmethod
    def _fits(cls, frozen: str, info: ValidationInfo) -> str:
        if frozen == "bfloat16" and info.data.get("compute") == "float32":
            raise ValueError("needs compute: bfloat16, since products take one dtype")
        return frozen

    def autocast(self, device: torch.device) -> AbstractContextManager:
        import torch

        return torch.autocast(device.type, torch.bfloat16, enabled=self.compute == "bfloat16")


def apply(precision: Precision, model: nn.Module, trainable: Iterable[str]) -> None:
    """Stores frozen matrices as the policy says, in place; what trains, and every vector and token, is float32."""
    import torch
    from torch import nn

    matrices = nn.Linear, nn.Conv2d, nn.Embedding
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    trains, dtype = set(trainable), getattr(torch, precision.frozen)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            stored = isinstance(module, matrices) and name == "weight" and named[id(parameter)] not in trains
            parameter.data = parameter.data.to(dtype if stored else torch.float32)
