"""Hugging Face's Swin Transformer, bare or with a classifier, of any version of Transformers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from snell_dist.weights._names import (
    HUGGING_FACE_BLOCK,
    TO_HUGGING_FACE_BLOCK,
    TO_HUGGING_FACE_PRE_NORM,
    Shapes,
    State,
    earlier_downsample,
    ends,
    fuse_qkv,
    later_downsample,
    rename,
    renamed,
    split_qkv,
)

NAME = "Hugging Face Swin"
RULES = (
    (r"^swin\.", ""),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attention\.(?:self\.|relative_position_bias\.)(relative_position_\w+)$", r".attn.\1"),
    *HUGGING_FACE_BLOCK,
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^classifier\.", "head.fc."),
)
PUBLISHED = (
    (r"^patch_embed\.norm\.", "embeddings.norm."),
    *TO_HUGGING_FACE_BLOCK,
    *TO_HUGGING_FACE_PRE_NORM,
    (r"\.attn\.", ".attention.self."),
    (r"^layers\.", "encoder.layers."),
)


def matches(state: State) -> bool:
    return ends(state, "embeddings.norm.weight", "encoder.layers.0.blocks.0.layernorm_before.weight")


def convert(state: State) -> State:
    return later_downsample(fuse_qkv(rename(state, *RULES)))


def publish(name: str, tensor: Tensor, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    if name.startswith("head.fc."):
        yield name.replace("head.fc.", "classifier."), tensor
        return
    for each, part in split_qkv(earlier_downsample(name), tensor):
        yield f"swin.{renamed(each, *PUBLISHED)}", part
