"""Hugging Face's ConvNeXt and ConvNeXt V2, bare or with a classifier."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from snell_dist.weights._names import Shapes, State, ends, rename, renamed

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
PUBLISHED = (
    (r"^stem\.0\.", "embeddings.patch_embeddings."),
    (r"^stem\.1\.", "embeddings.layernorm."),
    (r"^head\.norm\.", "layernorm."),
    (r"^stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
    (r"^stages\.(\d+)\.blocks\.", r"encoder.stages.\1.layers."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.norm\.", ".layernorm."),
    (r"\.mlp\.grn\.", ".grn."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"\.gamma$", ".layer_scale_parameter"),
)


def matches(state: State) -> bool:
    return ends(state, "embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.dwconv.weight")


def convert(state: State) -> State:
    return rename(state, *RULES)


def publish(name: str, tensor: Tensor, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """Global response normalisation keeps its vectors as [1, 1, 1, channels]."""
    if name.startswith("head.fc."):
        yield name.replace("head.fc.", "classifier."), tensor
        return
    second = has_response_norm(shapes)
    shaped = tensor[None, None, None] if ".grn." in name else tensor
    yield f"{'convnextv2' if second else 'convnext'}.{renamed(name, *PUBLISHED)}", shaped


def has_response_norm(shapes: Shapes) -> bool:
    """Whether it is a ConvNeXt V2."""
    return any(".grn." in name for name in shapes)
