"""Classification: cross-entropy on the logits of a classifier.

loss = mean over the batch of -sum_c target_c log softmax(logits)_c,   target = (1 - s) onehot(label) + s / classes

Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) mix an image and its target with those of another image of
the same micro-batch on the same process, by timm; so a micro-batch of one image is not mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from snell_dist import dist
from snell_dist.anatomy import Backbone
from snell_dist.backbones import BackboneSection
from snell_dist.data import PADDING, Batch, DataSection, Images, Splits
from snell_dist.tasks import TaskSection

if TYPE_CHECKING:
    from timm.data import Mixup
    from torch import Tensor, nn

    from snell_dist.engines import Engine
    from snell_dist.evaluate import Measured


class Classify(TaskSection):
    name: Literal["classify"]
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="s: share of the target that all classes get alike")
    mixup: float = Field(0.0, ge=0, description="alpha of the share's Beta(alpha, alpha) distribution; 0: no mixup")
    cutmix: float = Field(0.0, ge=0, description="alpha of the same for rectangles; 0: no cutmix")
    mixup_prob: float = Field(1.0, ge=0, le=1, description="of mixing a micro-batch")
    switch_prob: float = Field(0.5, ge=0, le=1, description="of cutmix where both are on")

    def build(self, backbone: BackboneSection, classes: Sequence[str]) -> Backbone:
        return backbone.build(classes)

    def logits(self, backbone: Backbone, classes: Sequence[str]) -> Callable[[Tensor], Tensor]:
        return backbone.model

    def prepare(self, backbone: Backbone, splits: Splits) -> Classification:
        classes = len(splits.classes)
        return Classification(classes, self.label_smoothing, self._mix(classes))

    def _mix(self, classes: int) -> Mixup | None:
        if not self.mixup and not self.cutmix:
            return None
        from timm.data import Mixup

        return Mixup(
            mixup_alpha=self.mixup, cutmix_alpha=self.cutmix, prob=self.mixup_prob, switch_prob=self.switch_prob,
            label_smoothing=self.label_smoothing, num_classes=classes,
        )  # fmt: skip


@dataclass(frozen=True)
class Classification:
    """See `Task` for the contract."""

    classes: int
    smoothing: float
    mix: Mixup | None

    def step(self, engine: Engine, batches: Iterable[Batch]) -> Tensor:
        import torch

        loss = torch.zeros((), device=engine.device)
        for batch in engine.accumulate(map(self.mixed, batches)):
            logits = engine.forward(batch.images)  # [B, C, H, W] to [B, classes]
            share = self._total(logits, batch.labels) / batch.total
            engine.backward(share * dist.world_size())  # engines average over ranks
            loss = loss + share.detach()
        return loss

    def mixed(self, batch: Batch) -> Batch:
        """The batch with images mixed (in place), and targets [B, classes] for labels, which are 0 for padding.

        Drawn from numpy's global generator, before the batch goes to the device: nothing there waits for it.
        """
        if self.mix is None:
            return batch
        from timm.data.mixup import mixup_target

        images, real = batch.images, (batch.labels != PADDING).nonzero().squeeze(1)
        targets = images.new_zeros(len(images), self.classes)
        targets[real] = mixup_target(batch.labels[real], self.classes, smoothing=self.smoothing)
        pairs = real[: len(real) // 2 * 2]  # of an odd number the last stays as it is
        if len(pairs):
            images[pairs], targets[pairs] = self.mix(images[pairs], batch.labels[pairs])
        return replace(batch, labels=targets)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._total(model(batch.images).float(), batch.labels) / (batch.labels != PADDING).sum()

    def _total(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of real images' losses; labels [B], or mixed targets [B, classes], which are smooth already."""
        from torch.nn.functional import cross_entropy

        smoothing = 0.0 if labels.is_floating_point() else self.smoothing
        return cross_entropy(logits, labels, ignore_index=PADDING, label_smoothing=smoothing, reduction="sum")

    def after_step(self, engine: Engine) -> None:
        pass

    def evaluate(self, engine: Engine, images: Images, data: DataSection) -> Measured:
        from snell_dist.evaluate import evaluate

        return evaluate(engine, lambda batch: engine.forward(batch.images), images, self.classes, data)
