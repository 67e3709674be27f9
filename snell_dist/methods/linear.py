"""Linear probe: only the classifier trains, on features that the frozen backbone gives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from snell_dist.methods import Method, select

if TYPE_CHECKING:
    from torch import nn


class Linear(Method):
    name: Literal["linear"]
    train: list[str] = Field(["head"], min_length=1, description="the classifier's parameters (globs)")

    def trainable(self, model: nn.Module, besides: Iterable[str]) -> list[str]:
        return select(model, self.train, "method.train")
