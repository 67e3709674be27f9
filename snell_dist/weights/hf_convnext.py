"""Hugging Face's ConvNeXt and ConvNeXt V2, bare or with a classifier."""

from __future__ import annotations

from snell_dist.weights._names import State, ends, rename

NAME = "Hugging Face ConvNeXt"
RULES = (
    (r"^convnext(?:v2)?\.", ""),
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.", r"stages.\1.blocks."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.layernorm\.", ".norm."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"\.grn\.", ".mlp.grn."),
    (r"\.layer_scale_parameter$", ".gamma"),
    (r"^layernorm\.", "head.norm."),
    (r"^classifier\.", "head.fc."),
)


def matches(state: State) -> bool:
    return ends(state, "embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.dwconv.weight")


def convert(state: State) -> State:
    return rename(state, *RULES)
