"""What layouts share: renaming by rules, and one fused matrix of q, k and v."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]
Shapes = Mapping[str, Tensor]  # tensors without numbers, on the meta device
Rules = Sequence[tuple[str, str]]

# A block of Hugging Face's Transformers, as published and as its later versions name it.
HUGGING_FACE_BLOCK: Rules = (
    (r"\.attention\.(?:attention\.|self\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
)

# The other way, to the names as published.
TO_HUGGING_FACE_BLOCK: Rules = (
    (r"\.attn\.q\.", ".attn.query."),
    (r"\.attn\.k\.", ".attn.key."),
    (r"\.attn\.v\.", ".attn.value."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
)
TO_HUGGING_FACE_PRE_NORM: Rules = (
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)


def ends(state: State, *endings: str) -> bool:
    """Whether each of the endings is that of some name."""
    return all(any(name.endswith(ending) for name in state) for ending in endings)


def rename(state: State, *rules: tuple[str, str]) -> State:
    """Every rule, a pattern and what replaces it, on every name, in order."""
    return {renamed(name, *rules): tensor for name, tensor in state.items()}


def renamed(name: str, *rules: tuple[str, str]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def fuse_qkv(state: State, fused: str = "{}.qkv.{}") -> State:
    """Rows of `x.q`, `x.k` and `x.v` in one tensor; `fused` makes its name of x and weight or bias."""
    result = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"(.+)\.([qkv])\.(weight|bias)", name)
        if found is None:
            result[name] = tensor
        elif found[2] == "q":
            parts = [state[f"{found[1]}.{part}.{found[3]}"] for part in "qkv"]
            result[fused.format(found[1], found[3])] = torch.cat(parts)
    return result


def split_qkv(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The other way: `x.q`, `x.k` and `x.v` are views of their rows in `x.qkv` or `x.in_proj`."""
    found = re.fullmatch(r"(.+)\.(?:qkv\.|in_proj_)(weight|bias)", name)
    if found is None:
        yield name, tensor
    else:
        yield from zip((f"{found[1]}.{part}.{found[2]}" for part in "qkv"), tensor.chunk(3), strict=True)


def later_downsample(state: State) -> State:
    """Swin's reductions as the beginning of a stage, where timm has them, and not the end of the one before."""
    return {
        re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name): tensor
        for name, tensor in state.items()
    }


def earlier_downsample(name: str) -> str:
    """The other way, of one name."""
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name)


def fold_class_position(state: State) -> State:
    """The class token with its position added: timm gives positions to patches alone where there are registers."""
    if "reg_token" not in state:
        return state
    positions = state["pos_embed"]
    return state | {"cls_token": state["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
