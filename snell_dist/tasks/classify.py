"""Classification: cross-entropy on the logits of a classifier.

loss = mean over the batch of -log softmax(logits)[label]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from snell_dist import dist
from snell_dist.anatomy import Backbone
from snell_dist.backbones import BackboneSection
from snell_dist.data import PADDING, Batch, DataSection, Images, Splits
from snell_dist.tasks import TaskSection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snell_dist.engines import Engine
    from snell_dist.evaluate import Measured


class Classify(TaskSection):
    name: Literal["classify"]

    def build(self, backbone: BackboneSection, splits: Splits) -> Backbone:
        return backbone.build(splits.classes)

    def prepare(self, backbone: Backbone, splits: Splits) -> Classification:
        return Classification(len(splits.classes))


@dataclass(frozen=True)
class Classification:
    """See `Task` for the contract."""

    classes: int

    def step(self, engine: Engine, batches: Iterable[Batch]) -> Tensor:
        import torch
        from torch.nn.functional import cross_entropy

        loss = torch.zeros((), device=engine.device)
        for batch in engine.accumulate(batches):
            logits = engine.forward(batch.images)  # [B, C, H, W] to [B, classes]
            share = cross_entropy(logits, batch.labels, ignore_index=PADDING, reduction="sum") / batch.total
            engine.backward(share * dist.world_size())  # engines average over ranks
            loss += share.detach()
        return loss

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(model(batch.images).float(), batch.labels, ignore_index=PADDING)

    def after_step(self, model: nn.Module) -> None:
        pass

    def evaluate(self, engine: Engine, images: Images, data: DataSection) -> Measured:
        from snell_dist.evaluate import evaluate

        return evaluate(engine, lambda batch: engine.forward(batch.images), images, self.classes, data)
