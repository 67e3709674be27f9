"""Hugging Face's ViT and DeiT, bare or with a classifier, of any version of Transformers."""

from __future__ import annotations

from snell_dist.weights._names import HUGGING_FACE_BLOCK, State, ends, fuse_qkv, rename

NAME = "Hugging Face ViT"
RULES = (
    (r"^(?:vit|deit)\.", ""),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    *HUGGING_FACE_BLOCK,
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)


def matches(state: State) -> bool:
    return ends(state, "embeddings.position_embeddings", ".0.layernorm_before.weight")


def convert(state: State) -> State:
    return fuse_qkv(rename(state, *RULES))
