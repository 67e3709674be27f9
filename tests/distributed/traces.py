"""Runs of doctor/trace.py by real processes, and what they left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ranks import together
from safetensors.torch import load_file
from torch import Tensor

from snell_dist.doctor import parity
from snell_dist.doctor import trace as traced
from snell_dist.doctor.trace import Case, Plan, Trace

# A model of a second, without what ranks draw for themselves; 8 images a step.
SMALL = [
    "backbone.weights=null", "backbone.width=16", "backbone.depth=2", "backbone.heads=2", "data.batch_size=8",
    "train.steps=20", "train.device=cpu",
]  # fmt: skip
ENGINES = parity.ENGINES | {
    "fsdp_replicate": [*parity.ENGINES["fsdp"], "engine.frozen=replicate"],
    "fsdp_offload": [*parity.ENGINES["fsdp"], "engine.frozen=offload", "engine.reshard=false"],
    "zero2": [*parity.ENGINES["zero2"], "engine.offload_optimizer=true"],
}


def follow(out: Path, cases: Sequence[Case], steps: int, processes: int = 1) -> None:
    """All cases in one group of so many processes."""
    together(processes, traced.follow, Plan("demo", list(cases), steps, "cpu", out))


def trace(out: Path, name: str) -> Trace:
    return Trace.read(out, name)


def weights(out: Path, name: str) -> dict[str, Tensor]:
    return load_file(out / f"{name}.safetensors")
