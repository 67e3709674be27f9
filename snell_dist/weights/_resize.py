"""Tensors whose size follows the image, the window or the context: from the file's size to the model's."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn
from torch.nn import functional as F


def to_model(model: nn.Module, name: str, tensor: Tensor, target: Tensor) -> tuple[Tensor, str] | None:
    """`tensor` in the target's shape, and a word on what changed, if anything; None where it cannot be had."""
    if tensor.shape == target.shape:
        return tensor, ""
    # Lengths of one say nothing: a linear layer is a 1x1 convolution, a scalar a vector of one.
    if [n for n in tensor.shape if n != 1] == [n for n in target.shape if n != 1]:
        return tensor.reshape(target.shape), ""
    owner, _, leaf = name.rpartition(".")
    if tensor.ndim != target.ndim or tensor.shape[-1] != target.shape[-1]:
        return None
    module: Any = model.get_submodule(owner)
    if leaf == "pos_embed" and hasattr(module, "patch_embed"):
        grid, has_class = module.patch_embed.grid_size, getattr(module, "cls_token", None) is not None
        return _grid(name, tensor, target, grid, has_class)
    if leaf == "positional_embedding" and hasattr(module, "grid_size"):
        return _grid(name, tensor, target, module.grid_size, has_class=True)
    if leaf == "positional_embedding":
        return _line(name, tensor, target)
    if leaf == "relative_position_bias_table":
        return _table(name, tensor, target, module.window_size)
    return None


def _grid(
    name: str, tensor: Tensor, target: Tensor, grid: tuple[int, int], has_class: bool
) -> tuple[Tensor, str] | None:
    """Positions of a square of patches [..., N, D], bicubically; those of class and registers in front are kept."""
    tokens, kept = tensor.shape[-2], target.shape[-2] - grid[0] * grid[1]
    # The file may have one more, a distillation token's. The class token's is not dropped where there is one.
    fronts = (kept,) if kept == 0 and has_class else (kept, kept + 1)
    found = next((n for n in fronts if tokens > n and isqrt(tokens - n) ** 2 == tokens - n), None)
    if found is None:
        return None
    side = isqrt(tokens - found)
    front, patches = tensor[..., :kept, :].float(), tensor[..., found:, :].float()
    image = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=tuple(grid), mode="bicubic", align_corners=False, antialias=False)
    patches = image.permute(0, 2, 3, 1).reshape(*target.shape[:-2], -1, target.shape[-1])
    note = "" if (side, side) == tuple(grid) else f"{name} {side}x{side} to {grid[0]}x{grid[1]}"
    return torch.cat([front, patches], dim=-2), note


def _line(name: str, tensor: Tensor, target: Tensor) -> tuple[Tensor, str]:
    """Positions in a text [N, D], linearly."""
    resized = F.interpolate(tensor.T[None].float(), size=len(target), mode="linear", align_corners=False)
    return resized[0].T, f"{name} {len(tensor)} to {len(target)}"


def _table(name: str, tensor: Tensor, target: Tensor, window: tuple[int, int]) -> tuple[Tensor, str] | None:
    """Swin's biases by relative position [(2 W - 1)^2, heads], by timm's rule."""
    side = isqrt(len(tensor))
    if side**2 != len(tensor):
        return None
    resized = resize_rel_pos_bias_table(tensor.float(), new_window_size=window, new_bias_shape=tuple(target.shape))
    return resized, f"{name} {side}x{side} to {2 * window[0] - 1}x{2 * window[1] - 1}"
