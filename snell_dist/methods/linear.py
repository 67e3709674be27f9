"""Linear probe: only the classifier trains, on features that the frozen backbone gives."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from snell_dist.anatomy import Backbone, select_names
from snell_dist.methods import Method


class Linear(Method):
    name: Literal["linear"]
    about: ClassVar[str] = "linear probe: the classifier"
    train: list[str] | None = Field(None, min_length=1, description="parameters (globs); null: the classifier")

    def trainable(self, backbone: Backbone) -> list[str]:
        names = [name for name, _ in backbone.model.named_parameters()]
        return select_names(names, self.train or backbone.head, backbone.blocks, "method.train")
