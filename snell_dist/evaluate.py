"""What a model gets right over a whole split: every image once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from snell_dist import dist, heartbeat
from snell_dist.data import PADDING, Batch, DataSection, Images
from snell_dist.feed import every_once

if TYPE_CHECKING:
    from snell_dist.engines import Engine

BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Measured:
    """The same on every rank. Tensors [N] on the CPU, in the split's order.

    `metrics`: `accuracy` (top-1) and `accuracy_top5` (where there are more than 5 classes) as fractions of images,
    `mean_per_class` the mean accuracy of the classes that have images, `calibration_error` the expected one over 15
    bins, `loss` the mean cross-entropy in nats.
    """

    metrics: dict[str, float]
    label: Tensor
    predicted: Tensor
    confidence: Tensor  # probability of the predicted class


def evaluate(
    engine: Engine, logits_of: Callable[[Batch], Tensor], images: Images, classes: int, data: DataSection
) -> Measured:
    """logits_of: a batch to [B, classes]; the engine's model evaluates meanwhile."""
    training = engine.model.training
    engine.model.eval()
    found = measure(logits_of, images, classes, data, engine.device)
    engine.model.train(training)
    return found


@torch.no_grad()  # not inference_mode: FSDP2 cannot train on after it
def measure(
    logits_of: Callable[[Batch], Tensor], images: Images, classes: int, data: DataSection, device: torch.device
) -> Measured:
    """logits_of: a batch on the device to [B, classes]."""
    heartbeat.enter("evaluate")
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_accuracy  # seconds

    rows, sizes = [], []
    for batch in every_once(images, data):
        heartbeat.enter("evaluate")
        batch = batch.to(device)
        rows.append(_rows(logits_of(batch).float(), batch.labels))
        sizes.append(len(batch.labels))
    mine = torch.cat(rows)
    ranks = dist.gather_rows(mine).view(-1, *mine.shape).split(sizes, dim=1)  # a batch: [ranks, B, 5]
    whole = torch.cat([batch.flatten(0, 1) for batch in ranks]).cpu()
    label, predicted, confidence, place, loss = whole[whole[:, 0] != PADDING].t().contiguous()
    label, predicted = label.long(), predicted.long()
    each = multiclass_accuracy(predicted, label, classes, average="none")  # 0 for a class without images
    metrics = {
        "accuracy": multiclass_accuracy(predicted, label, classes, average="micro").item(),
        "mean_per_class": each[label.unique()].mean().item(),
        "calibration_error": binary_calibration_error(confidence, (predicted == label).long(), n_bins=BINS).item(),
        "loss": loss.double().mean().item(),
    }
    if classes > 5:
        metrics["accuracy_top5"] = (place < 5).double().mean().item()
    return Measured(metrics, label, predicted, confidence)


def _rows(logits: Tensor, labels: Tensor) -> Tensor:
    """[B, 5] float32 of each image: label, predicted class, its probability, how many classes beat the label, loss."""
    confidence, predicted = logits.softmax(1).max(1)
    own = logits.gather(1, labels.clamp(min=0).unsqueeze(1))
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)
    place = (~(logits <= own) | (logits == own) & earlier).sum(1)  # the first of equals wins; nan beats all
    loss = F.cross_entropy(logits, labels, ignore_index=PADDING, reduction="none")
    return torch.stack([labels.float(), predicted.float(), confidence, place.float(), loss], 1)
