"""Tokens that join a block's input and leave its output; see methods/prompt.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snell_dist.config import UserError


class Prompts(nn.Module):
    """`count` trained tokens of `width`, uniform as in VPT (bound sqrt(6 / (fan in + fan out)) of a square layer)."""

    mergeable = False

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        bound = (3 / width) ** 0.5
        self.tokens = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))

    def attach(self, block: nn.Module) -> None:
        """Around the block's call, so that activation checkpointing of its forward stays within."""
        block.add_module("prompts", self.to(next(block.parameters()).device))
        block.register_forward_pre_hook(self._join)
        block.register_forward_hook(self._leave)

    def _join(self, block: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = arguments[0]  # [B, N, D]
        if x.ndim != 3:
            raise UserError(f"method.name = 'prompt': {type(block).__name__} takes {list(x.shape)}, no plain tokens")
        return torch.cat([x, self.tokens.to(x.dtype).expand(x.shape[0], -1, -1)], 1), *arguments[1:]

    def _leave(self, block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return output[:, : -len(self.tokens)]
