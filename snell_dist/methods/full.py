"""Full fine-tuning: every parameter trains. Memory: weights, gradients and two Adam moments, each whole."""

from __future__ import annotations

from typing import ClassVar, Literal

from snell_dist.anatomy import Backbone
from snell_dist.methods import Method


class Full(Method):
    name: Literal["full"]
    about: ClassVar[str] = "full fine-tuning: every parameter"

    def trainable(self, backbone: Backbone) -> list[str]:
        return [name for name, _ in backbone.model.named_parameters()]
