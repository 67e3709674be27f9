"""Hugging Face's Swin Transformer, bare or with a classifier, of any version of Transformers."""

from __future__ import annotations

from snell_dist.weights._names import HUGGING_FACE_BLOCK, State, ends, fuse_qkv, later_downsample, rename

NAME = "Hugging Face Swin"
RULES = (
    (r"^swin\.", ""),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attention\.(?:self\.|relative_position_bias\.)(relative_position_\w+)$", r".attn.\1"),
    *HUGGING_FACE_BLOCK,
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^classifier\.", "head.fc."),
)


def matches(state: State) -> bool:
    return ends(state, "embeddings.norm.weight", "encoder.layers.0.blocks.0.layernorm_before.weight")


def convert(state: State) -> State:
    return later_downsample(fuse_qkv(rename(state, *RULES)))
