"""Data: images with labels, and the order in which training sees them. One file a source, found by its name.

The order is a pure function of (seed, step): the global batch of a step is a slice of its epoch's
permutation, whatever the number of processes, so a resumed run continues exactly where it stood.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from snell_dist import dist
from snell_dist.config import ConfigError, Problem, Section

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset

PADDING = -1  # the label of an image that fills up a batch and counts for nothing


@dataclass(frozen=True)
class Splits:
    """Datasets of (image [C, H, W] float32, label int). Choices are made on val; test is looked at once."""

    train: Dataset
    val: Dataset
    test: Dataset
    classes: list[str]
    image_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Batch:
    """images [B, C, H, W], labels [B]; `total` real images in the whole step, over micro-batches and ranks."""

    images: Tensor
    labels: Tensor
    total: int
    last: bool

    def to(self, device: torch.device) -> Batch:
        moved = self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return Batch(*moved, self.total, self.last)


class DataSection(Section):
    """What every source says."""

    name: str
    batch_size: int = Field(64, ge=1, description="images per step, over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="images per process at a time; gradients accumulate to batch_size; null: all at once"
    )

    def load(self) -> Splits:
        """Reads the source. UserError where it is missing or damaged."""
        raise NotImplementedError

    def accumulation(self) -> int:
        """Micro-batches per step. ConfigError where batch_size does not divide."""
        share, rest = divmod(self.batch_size, dist.world_size())
        if rest:
            raise ConfigError(
                Problem("data.batch_size", f"must be a multiple of world_size {dist.world_size()}", self.batch_size)
            )
        micro = self.micro_batch_size or share
        if share % micro:
            message = f"must divide the {share} images of each process (batch_size {self.batch_size} / world_size)"
            raise ConfigError(Problem("data.micro_batch_size", message, micro))
        return share // micro


def steps_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """The last, smaller batch is kept."""
    return -(-len(dataset) // batch_size)  # type: ignore[arg-type]


def batch_indices(size: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the global batch of a step, as a function of (seed, step) alone."""
    epoch, position = divmod(step, -(-size // batch_size))
    return _epoch_order(size, epoch, seed)[position * batch_size : (position + 1) * batch_size].tolist()


@functools.lru_cache(maxsize=1)
def _epoch_order(size: int, epoch: int, seed: int) -> np.ndarray:
    import numpy as np

    return np.random.default_rng([seed, epoch]).permutation(size)


def micro_batches(dataset: Dataset, data: DataSection, step: int, seed: int, shared: bool = False) -> Iterator[Batch]:
    """This process's micro-batches of one step. Ranks get equally many images: short batches are padded.

    `shared`: instead, every rank gets all of the step's micro-batches.
    """
    indices = batch_indices(len(dataset), data.batch_size, step, seed)  # type: ignore[arg-type]
    rank, ranks = (0, 1) if shared else (dist.rank(), dist.world_size())
    pieces = data.accumulation() * (dist.world_size() if shared else 1)
    size = -(-len(indices) // (pieces * ranks))
    for piece in range(pieces):
        start = (piece * ranks + rank) * size
        mine = indices[start : start + size]
        yield Batch(*_collate(dataset, mine, size), total=len(indices), last=piece == pieces - 1)


def every_once(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    """This process's share of an evaluation: every image once over all ranks, equally many batches on each."""
    count, ranks, me = len(dataset), dist.world_size(), dist.rank()  # type: ignore[arg-type]
    for start in range(0, count, batch_size * ranks):
        first = start + me * batch_size
        mine = list(range(min(first, count), min(first + batch_size, count)))
        size = min(batch_size, count - start)  # the fullest rank's share
        yield Batch(*_collate(dataset, mine, size), total=count, last=start + batch_size * ranks >= count)


def _collate(dataset: Dataset, indices: list[int], size: int) -> tuple[Tensor, Tensor]:
    """Stacks the images, padded to `size` with copies of the dataset's first under the label PADDING."""
    import torch

    pairs = [dataset[i] for i in indices] + [(dataset[0][0], PADDING)] * (size - len(indices))
    images, labels = zip(*pairs, strict=True)
    return torch.stack(images), torch.tensor(labels)
