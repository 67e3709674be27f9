"""Full fine-tuning: every parameter trains. Memory: weights, gradients and two Adam moments, each whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from snell_dist.methods import Method

if TYPE_CHECKING:
    from torch import nn


class Full(Method):
    name: Literal["full"]

    def trainable(self, model: nn.Module, besides: Iterable[str]) -> list[str]:
        return [name for name, _ in model.named_parameters()]
