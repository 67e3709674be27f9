"""Google's Vision Transformers (Dosovitskiy et al., 2021) and those of big_vision: arrays of JAX, usually .npz.

Kernels are [in, out], or [height, width, in, out], and those of attention keep the heads apart.
"""

from __future__ import annotations

from torch import Tensor

from snell_dist.weights._names import State, fuse_qkv, rename

NAME = "JAX ViT"
PREFIXES = ("", "opt/target/", "params/")
STACKED = "Transformer/encoderblock/"  # big_vision may keep all blocks in one array
RULES = (
    (r"^embedding/", "patch_embed/proj/"),
    (r"^cls$", "cls_token"),
    (r"^(Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"/MultiHeadDotProductAttention_[01]/(q|k|v)(?:uery|ey|alue)/", r"/attn/\1/"),
    (r"/MultiHeadDotProductAttention_[01]/out/", "/attn/proj/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_[12]/", "/norm2/"),
    (r"/MlpBlock_[03]/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_[03]/Dense_1/", "/mlp/fc2/"),
    (r"/(?:kernel|scale)$", "/weight"),
    (r"/", "."),
)


def matches(state: State) -> bool:
    return any(f"{prefix}embedding/kernel" in state for prefix in PREFIXES)


def convert(state: State) -> State:
    prefix = next(prefix for prefix in PREFIXES if f"{prefix}embedding/kernel" in state)
    arrays = _unstacked({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    return fuse_qkv(rename({name: _oriented(name, tensor) for name, tensor in arrays.items()}, *RULES))


def _unstacked(state: State) -> State:
    result: State = {}
    for name, tensor in state.items():
        if name.startswith(STACKED):
            rest = name.removeprefix(STACKED)
            result |= {f"Transformer/encoderblock_{i}/{rest}": each for i, each in enumerate(tensor.unbind())}
        else:
            result[name] = tensor
    return result


def _oriented(name: str, tensor: Tensor) -> Tensor:
    """As torch has it: outputs first, heads flattened."""
    if name.endswith("/bias"):
        return tensor.flatten()
    if not name.endswith("/kernel"):
        return tensor
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1)
    return (tensor.flatten(0, 1) if tensor.ndim == 3 and name.endswith("/out/kernel") else tensor.flatten(1)).T
