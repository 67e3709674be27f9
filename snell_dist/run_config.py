"""The whole configuration of a run: which sections there are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from snell_dist.backbones import BackboneSection
from snell_dist.config import Plugin, Section
from snell_dist.data import DataSection
from snell_dist.engines import EngineSection
from snell_dist.methods import Method
from snell_dist.optim import Optim
from snell_dist.precision import Precision
from snell_dist.remat import Remat
from snell_dist.tasks import TaskSection


class Train(Section):
    steps: int = Field(ge=1, description="optimizer steps")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    log_every: int = Field(10, ge=1, description="steps")
    eval_every: int | None = Field(
        None, ge=1, description="steps between looks at the validation images; null: only at the end"
    )
    save_every: int = Field(100, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints stay")


class Run(Section):
    """One training run. Every section's schema is in the file that it configures."""

    backbone: Annotated[BackboneSection, Plugin("backbones")]
    method: Annotated[Method, Plugin("methods")]
    data: Annotated[DataSection, Plugin("data")]
    task: Annotated[TaskSection, Plugin("tasks", default="classify")]
    engine: Annotated[EngineSection, Plugin("engines", default="ddp")]
    precision: Precision = Precision()
    remat: Remat = Remat()
    optim: Optim = Optim()
    train: Train
