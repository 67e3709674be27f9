"""Hugging Face's ViT and DeiT, bare or with a classifier, of any version of Transformers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from snell_dist.weights._names import (
    HUGGING_FACE_BLOCK,
    TO_HUGGING_FACE_BLOCK,
    TO_HUGGING_FACE_PRE_NORM,
    Shapes,
    State,
    ends,
    fuse_qkv,
    rename,
    renamed,
    split_qkv,
)

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
PUBLISHED = (
    *TO_HUGGING_FACE_BLOCK,
    *TO_HUGGING_FACE_PRE_NORM,
    (r"\.attn\.", ".attention.attention."),
    (r"^blocks\.", "encoder.layer."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^dist_token$", "embeddings.distillation_token"),
    (r"^cls_token$", "embeddings.cls_token"),
)


def matches(state: State) -> bool:
    return ends(state, "embeddings.position_embeddings", ".0.layernorm_before.weight")


def convert(state: State) -> State:
    return fuse_qkv(rename(state, *RULES))


def publish(name: str, tensor: Tensor, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    distilled = "head_dist.weight" in shapes
    heads = {"head": "cls_classifier" if distilled else "classifier", "head_dist": "distillation_classifier"}
    module, _, leaf = name.rpartition(".")
    if module in heads:
        yield f"{heads[module]}.{leaf}", tensor
        return
    for each, part in split_qkv(name, tensor):
        yield f"{'deit' if distilled else 'vit'}.{renamed(each, *PUBLISHED)}", part
