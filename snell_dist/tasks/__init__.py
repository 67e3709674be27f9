"""Tasks: what a model is trained for. One file a task, found by its name.

A task is a config section that has the model built as it needs it and gives the loop a step: forward and
backward over the micro-batches of one optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from snell_dist.anatomy import Backbone
from snell_dist.backbones import BackboneSection
from snell_dist.config import Section
from snell_dist.data import Batch, DataSection, Images, Splits

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snell_dist.engines import Engine
    from snell_dist.evaluate import Measured


class Task(Protocol):
    """What the loop needs."""

    def step(self, engine: Engine, batches: Iterable[Batch]) -> Tensor:
        """Gradients of the mean loss over all ranks' batches; returns this rank's share of that mean (they sum up)."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of one batch on a bare model, for methods that look before they train."""
        ...

    def after_step(self, engine: Engine) -> None:
        """Keeps parameters where the task wants them."""
        ...

    def evaluate(self, engine: Engine, images: Images, data: DataSection) -> Measured:
        """Every image once."""
        ...


class TaskSection(Section):
    """What every task says."""

    name: str

    def build(self, backbone: BackboneSection, classes: Sequence[str]) -> Backbone:
        """The model as the task needs it. ConfigError where the family cannot do it."""
        raise NotImplementedError

    def logits(self, backbone: Backbone, classes: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """From images [B, C, H, W] to logits [B, classes], for a model that is trained and evaluates."""
        raise NotImplementedError

    def prepare(self, backbone: Backbone, splits: Splits) -> Task:
        raise NotImplementedError
