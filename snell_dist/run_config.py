"""The whole configuration of a run: which sections there are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from snell_dist.backbones import BackboneSection
from snell_dist.config import Plugin, Section
from snell_dist.data import DataSection
from snell_dist.engines import EngineSection
from snell_dist.methods import Method
from snell_dist.optim import Optim
from snell_dist.precision import Precision
from snell_dist.protocol import Protocol
from snell_dist.remat import Remat
from snell_dist.tasks import TaskSection


class Train(Section):
    steps: int | None = Field(None, ge=1, description="optimizer steps; or say epochs")
    epochs: int | None = Field(None, ge=1, description="passes over the training images; or say steps")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    log_every: int = Field(10, ge=1, description="steps")
    eval_every: int | None = Field(
        None, ge=1, description="steps between looks at the weights (see protocol); null: only at the end"
    )
    eval_epochs: int | None = Field(None, ge=1, description="epochs between looks, besides or instead")
    eval_last_epochs: int = Field(0, ge=0, description="a look after each of so many last epochs, besides")
    save_every: int = Field(100, ge=1, description="steps between checkpoints")
    save_in_background: bool = Field(False, description="write checkpoints while training goes on, from a copy")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop", description="where the loss or the gradient is not finite: end the run, or leave the step out"
    )
    hang_timeout_s: float = Field(
        600.0, gt=0, description="seconds without progress after which a run ends, and says which rank keeps the others"
    )
    keep: int = Field(2, ge=1, description="how many of the newest checkpoints stay")
    track: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="trackers that follow the run (extra trackers)"
    )

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("must say either steps or epochs (the other one null)")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.steps or (self.epochs or 0) * steps_per_epoch

    def looks(self, done: int, steps_per_epoch: int) -> bool:
        """Whether the weights are looked at after `done` steps; they are at the end."""
        steps = self.total_steps(steps_per_epoch)
        epoch, inside = divmod(done, steps_per_epoch)
        every = self.eval_every is not None and done % self.eval_every == 0
        epochs = self.eval_epochs is not None and not inside and epoch % self.eval_epochs == 0
        late = not inside and epoch > steps / steps_per_epoch - self.eval_last_epochs
        return every or epochs or late or done == steps


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
    protocol: Protocol = Protocol()
    train: Train
