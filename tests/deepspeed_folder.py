"""Writes DeepSpeed checkpoints as other people's scripts do, and beside each the weights that were in memory."""

from __future__ import annotations

import os
from pathlib import Path

import timm
import torch
from torch import nn

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 5}
NAME = "vit_tiny_patch16_224"
STAGES = 1, 2, 3


def model() -> nn.Module:
    """With a frozen block, a buffer of integers and a tied tensor; head.bias is odd, so that ranks pad it."""
    torch.manual_seed(0)
    made = timm.create_model(NAME, **SIZES)
    made.blocks[0].requires_grad_(False)
    made.register_buffer("seen", torch.arange(3))
    made.blocks[1].norm2.weight = made.blocks[1].norm1.weight
    return made


def write(folder: Path) -> None:
    """Of every stage, FOLDER/<stage>/saved (DeepSpeed's) and live.pt."""
    for stage in STAGES:
        (folder / str(stage)).mkdir(exist_ok=True)
        write_stage(stage, folder / str(stage))


def write_stage(stage: int, folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # of inference; takes minutes to compile
    made = model()
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=made, optimizer=optimizer, config=config)
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).square().mean())
        engine.step()
    engine.save_checkpoint(str(folder / "saved"))
    live = {}
    for name, parameter in made.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            live[name] = safe_get_full_fp32_param(parameter).clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                live[name] = parameter.detach().float().clone()
    live |= {name: buffer.clone() for name, buffer in made.named_buffers()}
    if torch.distributed.get_rank() == 0:
        torch.save(live, folder / "live.pt")
