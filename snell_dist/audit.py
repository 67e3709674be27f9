"""What a built model trains, what it keeps frozen, and in which precision: said once, before the first step."""

from __future__ import annotations

import math

import torch
from torch import nn

from snell_dist import dist
from snell_dist.build import Built
from snell_dist.memory.record import MIB
from snell_dist.run_config import Run


def audit(config: Run, built: Built, device: torch.device) -> str:
    """A table over kinds of modules, and the settings that decide cost."""
    model, trainable = built.engine.model, set(built.trainable)
    sizes = entries(model)
    trains, total = sum(sizes[name] for name in trainable), sum(sizes.values())
    precision, remat = config.precision, config.remat
    lines = [
        f"{built.backbone.name}, {config.method.name}: {trains:,} of {total:,} parameters train ({trains / total:.1%})",
        *table(model, trainable),
        f"products in {precision.compute}, frozen base in {precision.frozen}, what trains in float32",
        f"activation checkpointing: {remat.policy}" + (f", one block in {remat.every}" if remat.every > 1 else ""),
        f"{config.engine.name} on {dist.world_size()} x {device}, batch size {config.data.batch_size}",
    ]
    return "\n".join(lines)


def entries(model: nn.Module) -> dict[str, int]:
    """Numbers of each parameter; two of a packed weight may share a byte."""
    packed = {
        f"{name}.weight": m.packing for name, m in model.named_modules() if getattr(m, "packing", None) is not None
    }
    return {
        name: math.prod(packed[name].shape) if name in packed else p.numel() for name, p in model.named_parameters()
    }


def table(model: nn.Module, trainable: set[str]) -> list[str]:
    """One line for each kind of module, dtype, and whether it trains: tensors, parameters, MiB."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    sizes = entries(model)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        kind = type(model.get_submodule(owner)).__name__
        state = "trains" if name in trainable else "frozen"
        row = rows.setdefault((state, f"{kind}.{leaf}", str(parameter.dtype).removeprefix("torch.")), [0, 0, 0])
        for i, amount in enumerate((1, sizes[name], parameter.nbytes)):
            row[i] += amount
    ordered = sorted(rows.items(), key=lambda item: (item[0][0] != "trains", -item[1][1]))
    return [
        f"  {state}  {what:32} {dtype:9} {count:5} tensors {parameters:15,} parameters {size / MIB:10.2f} MiB"
        for (state, what, dtype), (count, parameters, size) in ordered
    ]
