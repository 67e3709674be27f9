"""Optimizer, parameter groups, and the learning rate as a function of the step (nothing to save)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from snell_dist.config import Section

if TYPE_CHECKING:
    import torch
    from torch import nn

NO_DECAY = ("pos_embed", "cls_token", "dist_token")


class Optim(Section):
    name: Literal["adamw", "adamw8bit", "sgd"] = Field(
        "adamw", description="adamw8bit: moments in 8 bits where a tensor has 4,096 entries or more (bitsandbytes)"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate; not scaled with batch or world size")
    weight_decay: float = Field(0.01, ge=0, description="not on vectors, biases, position and class tokens")
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2, description="AdamW's")
    eps: float = Field(1e-8, gt=0, description="AdamW's")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's")
    nesterov: bool = Field(False, description="SGD's")
    schedule: Literal["cosine", "cosine_epochs", "linear", "constant"] = Field(
        "cosine", description="after the warm-up, each step; cosine_epochs: each epoch, as the released code of SNELL"
    )
    warmup_steps: int = Field(0, ge=0, description="a linear rise from warmup_lr")
    warmup_epochs: int = Field(0, ge=0, description="the same, counted in epochs")
    warmup_lr: float = Field(0.0, ge=0)
    min_lr: float = Field(0.0, ge=0, description="where cosine and linear end")
    clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="of a moving average of what trains, which is measured and kept; null: none"
    )

    @model_validator(mode="after")
    def _fits(self) -> Optim:
        if self.warmup_steps and self.warmup_epochs:
            raise ValueError("must say either warmup_steps or warmup_epochs (the other one 0)")
        if self.warmup_steps and self.schedule == "cosine_epochs":
            raise ValueError("schedule cosine_epochs counts in epochs: say warmup_epochs in place of warmup_steps")
        if self.nesterov and not (self.name == "sgd" and self.momentum):
            raise ValueError("nesterov needs name: sgd and a momentum above 0")
        return self


def make_optimizer(optim: Optim, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Over the parameters that train, in two groups: with weight decay and without.

    Raises ConfigError where the optimizer's library is missing.
    """
    import torch

    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # of a part that ZeRO-3 holds: the whole's
            groups[len(shape) > 1 and name.rpartition(".")[2] not in NO_DECAY].append(parameter)
    settings = [
        {"params": parameters, "weight_decay": optim.weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(settings, lr=optim.lr, momentum=optim.momentum, nesterov=optim.nesterov)
    adamw = torch.optim.AdamW
    if optim.name == "adamw8bit":
        from snell_dist.packed import bitsandbytes

        adamw = bitsandbytes("optim.name").optim.AdamW8bit
    return adamw(settings, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)


def lr_at(optim: Optim, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate in force during `step` (from 0) of `steps`."""
    if optim.schedule == "cosine_epochs":
        return _lr_of_epoch(optim, step // steps_per_epoch, -(-steps // steps_per_epoch))
    warmup = optim.warmup_steps or optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return optim.warmup_lr + (optim.lr - optim.warmup_lr) * (step + 1) / (warmup + 1)
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "linear":
        return optim.lr + (optim.min_lr - optim.lr) * (step - warmup) / (steps - warmup)
    return _cosine(optim, step - warmup, steps - warmup)


def _lr_of_epoch(optim: Optim, epoch: int, epochs: int) -> float:
    """timm's cosine as the released code steps it: after each epoch, with that epoch's number.

    So the first number lasts for two epochs, and the warm-up hides the cosine's beginning instead of preceding it.
    """
    time = max(epoch - 1, 0)
    if time < optim.warmup_epochs:
        return optim.warmup_lr + time * ((optim.lr - optim.warmup_lr) / optim.warmup_epochs)
    return _cosine(optim, time, epochs)


def _cosine(optim: Optim, time: int, end: int) -> float:
    """In timm's order of operations, to agree with it in every digit."""
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * time / end))
