"""Trackers: observers that show a run elsewhere (`train.track`). Both are of the extra `trackers`.

tensorboard   RUN/tensorboard
wandb         the project `snell_dist`, or WANDB_PROJECT; WANDB_MODE=offline keeps it in RUN/wandb
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from snell_dist import log
from snell_dist.config import ConfigError, Problem, first_line
from snell_dist.observers import Moment, Observer


def check(names: Sequence[str]) -> None:
    """ConfigError where a tracker's library is missing."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        how = "is not installed: pip install 'snell_dist[trackers]'"
        raise ConfigError(*(Problem("train.track", how, name) for name in missing))


def make(names: Sequence[str], folder: Path, config: dict[str, Any]) -> list[Observer]:
    """The observers; `config` is the resolved one."""
    return [TensorBoard(folder) if name == "tensorboard" else Wandb(folder, config) for name in names]


class TensorBoard:
    """See `Observer`. Steps that a resumed run repeats replace the old ones."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._make = folder / "tensorboard", SummaryWriter
        self._writer: Any = None

    def on_step(self, moment: Moment) -> None:
        if not moment.metrics:
            return
        if self._writer is None:  # here the first step of a resumed run is known
            self._writer = self._make(str(self._folder), purge_step=moment.step)
        for name, value in moment.metrics.items():
            self._writer.add_scalar(name, value, moment.step)

    def on_end(self, summary: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.close()


class Wandb:
    """See `Observer`. A resumed run goes on under its id; trouble with the service is said, and training goes on."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run: Any = None
        try:
            self._run = wandb.init(
                id=identity, resume="allow", name=f"{folder.parent.name}/{folder.name}", dir=str(folder), config=config,
                settings=wandb.Settings(silent=True),
            )  # fmt: skip
        except Exception as error:  # whatever the service says, training is worth more
            log.info(f"wandb: {first_line(error)}; training goes on without it")

    def on_step(self, moment: Moment) -> None:
        if self._run is not None and moment.metrics:
            self._run.log(moment.metrics, step=moment.step)

    def on_end(self, summary: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.summary.update({k: v for k, v in summary.items() if isinstance(v, (int, float, str))})
            self._run.finish()
