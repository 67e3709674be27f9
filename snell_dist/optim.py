"""Optimizer, parameter groups, and the learning rate as a function of the step (nothing to save)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from snell_dist.config import Section

if TYPE_CHECKING:
    import torch
    from torch import nn

NO_DECAY = ("pos_embed", "cls_token", "dist_token")


class Optim(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0, description="peak learning rate; not scaled with batch or world size")
    weight_decay: float = Field(0.01, ge=0, description="not on vectors, biases, position and class tokens")
    betas: list[float] = Field(
        [0.9, 0.999], min_length=2, max_length=2, description="AdamW; SGD's momentum is the first"
    )
    eps: float = Field(1e-8, gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="linear, from 0")
    min_lr: float = Field(0.0, ge=0, description="where the cosine ends")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")


def make_optimizer(optim: Optim, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Over the parameters that train, in two groups: with weight decay and without."""
    import torch

    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and name.rpartition(".")[2] not in NO_DECAY].append(parameter)
    settings = [
        {"params": parameters, "weight_decay": optim.weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(settings, lr=optim.lr, momentum=optim.betas[0])
    return torch.optim.AdamW(settings, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)


def lr_at(optim: Optim, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate in force during `step` (from 0) of `steps`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / (optim.warmup_steps + 1)
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * progress)) / 2
