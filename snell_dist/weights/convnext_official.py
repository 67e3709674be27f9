"""Facebook's ConvNeXt (Liu et al., 2022) and ConvNeXt V2 (Woo et al., 2023)."""

from __future__ import annotations

from snell_dist.weights._names import State, rename

NAME = "ConvNeXt (Facebook)"
RULES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.gamma$", ".mlp.grn.weight"),
    (r"\.grn\.beta$", ".mlp.grn.bias"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def matches(state: State) -> bool:
    return "downsample_layers.0.0.weight" in state


def convert(state: State) -> State:
    return rename(state, *RULES)
