"""Runs of doctor/trace.py by real processes, and what they left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from conftest import ENVIRONMENT
from safetensors.torch import load_file
from torch import Tensor

from snell_dist.doctor.trace import Case, Plan, Trace

# A model of a second, without what ranks draw for themselves; 8 images a step.
SMALL = [
    "backbone.weights=null", "backbone.width=16", "backbone.depth=2", "backbone.heads=2", "data.batch_size=8",
    "train.steps=20", "train.device=cpu",
]  # fmt: skip
# DeepSpeed's own thresholds would keep a model as small as this gathered for ever.
NEVER_KEPT = {
    "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}  # fmt: skip
ENGINES = {
    "ddp": [],
    "fsdp": ["engine.name=fsdp"],
    "fsdp_replicate": ["engine.name=fsdp", "engine.frozen=replicate"],
    "fsdp_offload": ["engine.name=fsdp", "engine.frozen=offload", "engine.reshard=false"],
    "zero0": ["engine.name=zero", "engine.stage=0"],
    "zero1": ["engine.name=zero", "engine.stage=1"],
    "zero2": ["engine.name=zero", "engine.stage=2", "engine.offload_optimizer=true"],
    "zero3": [
        "engine.name=zero", "engine.stage=3",
        f"engine.deepspeed_extra={json.dumps({'zero_optimization': NEVER_KEPT})}",
    ],
}  # fmt: skip


def follow(out: Path, cases: Sequence[Case], steps: int, processes: int = 1, config: str = "demo") -> None:
    """All cases in one job of so many processes."""
    file = out / f"plan_{len(list(out.glob('plan_*')))}.json"
    Plan(config, list(cases), steps, "cpu", out).write(file)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "snell_dist.doctor.trace", str(file)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def trace(out: Path, name: str) -> Trace:
    return Trace.read(out, name)


def weights(out: Path, name: str) -> dict[str, Tensor]:
    return load_file(out / f"{name}.safetensors")
