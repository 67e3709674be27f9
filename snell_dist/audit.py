"""What a built model trains, what it keeps frozen, how it is divided, and in which precision: said before step 1."""

from __future__ import annotations

import re
from itertools import groupby

import torch

from snell_dist import dist, inventory
from snell_dist.build import Built
from snell_dist.engines import Unit
from snell_dist.inventory import MIB
from snell_dist.run_config import Run


def audit(config: Run, built: Built, device: torch.device) -> str:
    """A table over kinds of parameters, one over the engine's units, and the settings that decide cost."""
    entries = built.inventory
    trains, total = inventory.numbers(entries, trains=True), inventory.numbers(entries)
    precision, remat = config.precision, config.remat
    lines = [
        f"{built.backbone.name}, {config.method.name}: {trains:,} of {total:,} parameters train ({trains / total:.1%})",
        *inventory.table(entries),
        f"products in {precision.compute}, frozen base in {precision.frozen}, what trains in float32",
        f"activation checkpointing: {remat.policy}" + (f", one block in {remat.every}" if remat.every > 1 else ""),
        f"{config.engine.name} on {dist.world_size()} x {device}, batch size {config.data.batch_size}",
        *units(built.engine.units()),
    ]
    return "\n".join(lines)


def units(found: list[Unit]) -> list[str]:
    """One line for each run of units that are alike."""
    lines = []
    for _, run in groupby(found, key=_likeness):
        same = list(run)
        name = same[0].name if len(same) == 1 else f"{same[0].name} to {same[-1].name.rpartition('.')[2]}"
        one = same[0]
        gathered = f", {one.gathered_bytes / MIB:.2f} MiB gathered" if one.gathered_bytes else ""
        each = " each" if len(same) > 1 else ""
        lines.append(
            f"  {name}: {one.trains:,} train, {one.frozen:,} frozen, {' and '.join(one.dtypes)},"
            f" {one.held_bytes / MIB:.2f} MiB held{gathered}{each}"
        )
    return lines


def _likeness(unit: Unit) -> tuple[object, ...]:
    return re.sub(r"\d+$", "", unit.name), unit.trains, unit.frozen, unit.dtypes, unit.held_bytes, unit.gathered_bytes
