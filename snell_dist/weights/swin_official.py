"""Microsoft's Swin Transformers (Liu et al., 2021), and timm's before it moved the reductions."""

from __future__ import annotations

from snell_dist.weights._names import State, later_downsample, rename

NAME = "Swin (Microsoft)"


def matches(state: State) -> bool:
    return "layers.0.downsample.reduction.weight" in state


def convert(state: State) -> State:
    return rename(later_downsample(state), (r"^head\.(weight|bias)$", r"head.fc.\1"))
