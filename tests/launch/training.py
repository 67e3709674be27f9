"""A training of a second for two nodes with one process each, and what it must come to: that of one process."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from conftest import TINY
from conftest import train as train_here
from safetensors.torch import load_file
from torch import Tensor

from snell_dist.adapter import ADAPTER

RANKS = 2
SETTINGS = [*TINY, "method.rank=4", "train.log_every=1"]
MICRO = f"data.micro_batch_size={12 // RANKS}"  # for one process to take what each of two takes
# What a user's shell on the login node has.
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "DS_ACCELERATOR": "cpu",
}


@dataclass(frozen=True)
class Result:
    """What a finished run says."""

    losses: list[float]  # of all steps
    adapter: dict[str, Tensor]
    accuracy: float
    loss: float  # on test images
    world_sizes: list[int]  # of its attempts

    @classmethod
    def read(cls, folder: Path) -> Result:
        summary = json.loads((folder / "summary.json").read_text())
        return cls(
            losses=[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()],
            adapter=load_file(folder / ADAPTER),
            accuracy=summary["test_accuracy"],
            loss=summary["test_loss"],
            world_sizes=world_sizes(folder),
        )

    def differences(self, other: Result) -> list[str]:
        """Where their bits differ: none where both saw the same micro-batches in the same order."""
        steps = enumerate(zip_longest(self.losses, other.losses), 1)
        found = [f"step {n}: {one} and {another}" for n, (one, another) in steps if one != another]
        names = sorted({*self.adapter, *other.adapter})
        return found + [name for name in names if not _same(self.adapter.get(name), other.adapter.get(name))]


def alone(out: Path, *overrides: str) -> Result:
    """The same run in this process."""
    torch.set_num_threads(1)  # as there: sums of several threads have other bits
    folder = train_here(out, *SETTINGS, MICRO, *overrides).folder
    assert folder is not None
    return Result.read(folder)


def train(folder: Path, *overrides: str) -> list[str]:
    """The words that follow `python -m` of each rank."""
    return ["snell_dist", "train", "demo", *SETTINGS, *overrides, "--folder", str(folder)]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def steps(folder: Path) -> int:
    """How many steps a run has shown."""
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def world_sizes(folder: Path) -> list[int]:
    """Of a run's attempts up to now."""
    file = folder / "run.json"
    return [attempt["world_size"] for attempt in json.loads(file.read_text())] if file.exists() else []
