"""Hugging Face's DINOv2 (Oquab et al., 2023), with or without registers."""

from __future__ import annotations

from snell_dist.weights._names import HUGGING_FACE_BLOCK, State, ends, fold_class_position, fuse_qkv, rename

NAME = "Hugging Face DINOv2"
RULES = (
    (r"^dinov2(?:_with_registers)?\.", ""),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    *HUGGING_FACE_BLOCK,
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^classifier\.", "head."),
)


def matches(state: State) -> bool:
    return ends(state, "embeddings.position_embeddings", ".0.layer_scale1.lambda1")


def convert(state: State) -> State:
    return fold_class_position(fuse_qkv(rename(state, *RULES)))
