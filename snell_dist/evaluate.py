"""Accuracy and loss over a whole split: every image once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from snell_dist import dist
from snell_dist.data import PADDING, Batch, every_once

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from snell_dist.engines import Engine


@torch.no_grad()  # not inference_mode: FSDP2 cannot train on after it
def evaluate(
    engine: Engine, logits_of: Callable[[Batch], Tensor], dataset: Dataset, classes: int, batch_size: int
) -> dict[str, float]:
    """`accuracy`: top-1, a fraction of images. `loss`: mean cross-entropy in nats. logits_of: [B, classes]."""
    accuracy = MulticlassAccuracy(classes, average="micro", ignore_index=PADDING).to(engine.device)
    loss = torch.zeros((), dtype=torch.float64 if engine.device.type != "mps" else torch.float32, device=engine.device)
    training = engine.model.training
    engine.model.eval()
    for batch in every_once(dataset, batch_size):
        batch = batch.to(engine.device)
        logits = logits_of(batch)
        accuracy.update(logits, batch.labels)
        loss += F.cross_entropy(logits, batch.labels, ignore_index=PADDING, reduction="sum")
    engine.model.train(training)
    mean_loss = dist.sum_over_ranks(loss) / len(dataset)  # type: ignore[arg-type]
    return {"accuracy": accuracy.compute().item(), "loss": mean_loss.item()}
