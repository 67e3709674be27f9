"""Hugging Face's DINOv2 (Oquab et al., 2023), with or without registers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from snell_dist.weights._names import (
    HUGGING_FACE_BLOCK,
    TO_HUGGING_FACE_BLOCK,
    Shapes,
    State,
    ends,
    fold_class_position,
    fuse_qkv,
    rename,
    renamed,
    split_qkv,
)

NAME = "Hugging Face DINOv2"
RULES = (
    (r"^dinov2(?:_with_registers)?\.", ""),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    *HUGGING_FACE_BLOCK,
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.fc2."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^classifier\.", "head."),
)
PUBLISHED = (
    *TO_HUGGING_FACE_BLOCK,
    (r"\.attn\.", ".attention.attention."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^reg_token$", "embeddings.register_tokens"),
    (r"^cls_token$", "embeddings.cls_token"),
)
GATED = ((r"\.mlp\.fc1\.", ".mlp.weights_in."), (r"\.mlp\.fc2\.", ".mlp.weights_out."))


def matches(state: State) -> bool:
    return ends(state, "embeddings.position_embeddings", ".0.layer_scale1.lambda1")


def convert(state: State) -> State:
    return _of_class_token(fold_class_position(_fuse_gate(fuse_qkv(rename(state, *RULES)))))


def publish(name: str, tensor: Tensor, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """A model with registers gives the class token no position: it gets one of zeros."""
    if name == "head.weight":
        yield "classifier.weight", torch.cat([tensor, torch.zeros_like(tensor)], 1)
        return
    if name == "head.bias":
        yield "classifier.bias", tensor
        return
    registers = "reg_token" in shapes
    prefix = "dinov2_with_registers" if registers else "dinov2"
    if name == "pos_embed" and registers:
        tensor = torch.cat([torch.zeros_like(tensor[:, :1]), tensor], 1)
    if name == "reg_token":
        yield f"{prefix}.embeddings.mask_token", torch.zeros_like(tensor[0, :1])  # which its class must have
    gated = GATED if is_gated(shapes) else ()
    for each, part in split_qkv(name, tensor):
        yield f"{prefix}.{renamed(each, *PUBLISHED, *gated)}", part


def is_gated(shapes: Shapes) -> bool:
    """Whether fc1 has the gate's rows and the values', so twice what fc2 takes."""
    return shapes["blocks.0.mlp.fc1.weight"].shape[0] == 2 * shapes["blocks.0.mlp.fc2.weight"].shape[1]


def _fuse_gate(state: State) -> State:
    """Later versions keep the gate's rows and the values' apart."""
    fused = {
        name.replace(".gate_proj.", ".fc1."): torch.cat([tensor, state[name.replace(".gate_proj.", ".up_proj.")]])
        for name, tensor in state.items()
        if ".gate_proj." in name
    }
    return {name: t for name, t in state.items() if ".gate_proj." not in name and ".up_proj." not in name} | fused


def _of_class_token(state: State) -> State:
    """Its classifier sees the class token and the mean of the patches, timm's the first alone: so written by us."""
    weight, width = state.get("head.weight"), state["cls_token"].shape[-1]
    if weight is None or weight.shape[1] != 2 * width or (not weight.is_meta and weight[:, width:].any()):
        return state
    return state | {"head.weight": weight[:, :width]}
