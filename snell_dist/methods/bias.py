"""Bias tuning (BitFit; Ben Zaken et al., 2022): every bias of the backbone trains, and no weight.

    y = x W0^T + bias,  bias trains

Parameters: one number an output feature (ViT-B: 0.1 M). Memory: gradients flow through every layer, but a
linear layer needs no input for its bias, so activations are the fewest of all methods that reach each block.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from snell_dist.anatomy import Backbone
from snell_dist.methods import BesidesMethod


class Bias(BesidesMethod):
    name: Literal["bias"]
    about: ClassVar[str] = "BitFit: every bias"

    def added(self, backbone: Backbone) -> list[str]:
        return [name for name, _ in backbone.model.named_parameters() if name.rpartition(".")[2] == "bias"]
