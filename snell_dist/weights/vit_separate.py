"""Vision Transformers with q, k and v in layers of their own, as the SNELL paper's released code has them."""

from __future__ import annotations

from snell_dist.weights._names import State, fuse_qkv

NAME = "ViT with separate q, k, v"


def matches(state: State) -> bool:
    return "blocks.0.attn.q.weight" in state


def convert(state: State) -> State:
    return fuse_qkv(state)
