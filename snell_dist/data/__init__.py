"""Data: labelled images in three splits. One file a source, found by its name; `feed.py` says who sees what when."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import Field

from snell_dist import dist
from snell_dist.config import ConfigError, Problem, Section, UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

PADDING = -1  # the label of an image that fills up a batch and counts for nothing
MOST_WORKERS = 10


class Images(Protocol):
    """Labelled images, as the model takes them and as they are stored."""

    @property
    def labels(self) -> Sequence[int]: ...

    @property
    def augments(self) -> bool:
        """Whether an image is drawn anew each time, with random numbers."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image [C, H, W] float32 and label. UserError, naming the file, where it cannot be read."""
        ...

    def picture(self, index: int) -> Image.Image:
        """The image as it is stored."""
        ...

    def name(self, index: int) -> str:
        """What it is called in its source; no two of a split have the same."""
        ...

    def file(self, index: int) -> Path | None:
        """The file that holds it and nothing else, where there is one."""
        ...


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes what a trained model takes [channels, size, size], in numbers that other libraries know.

    squeeze: all of it, whatever its shape; centre: its shorter side at 256/224 of size, then the middle.
    """

    size: int  # pixels a side
    channels: int
    resize: Literal["squeeze", "centre"]
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, ...]  # of each channel, of values from 0 to 1
    std: tuple[float, ...]

    @property
    def mode(self) -> str:
        """Pillow's name of the colours."""
        return "L" if self.channels == 1 else "RGB"


@dataclass(frozen=True)
class Transforms:
    """From a picture to what the model takes [C, H, W]; and in words: resize, normalisation, augmentation."""

    training: Callable[[Image.Image], Tensor]
    evaluation: Callable[[Image.Image], Tensor]
    augments: bool  # training draws random numbers
    about: Mapping[str, str]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Splits:
    """Choices are made on val; test is looked at once.

    `about`: what a result must say of its data, such as resize, normalisation and which images train.
    `val_trains`: val's images are among train's.
    """

    train: Images
    val: Images
    test: Images
    classes: list[str]
    image_shape: tuple[int, int, int]
    preprocessing: Preprocessing | None = None  # None: of images that are made up
    about: Mapping[str, str] = field(default_factory=dict)
    val_trains: bool = False

    def sha256(self) -> str:
        """Of the names and labels of all three splits, in order: two runs that agree saw the same division."""
        found = hashlib.sha256()
        for split in (self.train, self.val, self.test):
            for index, label in enumerate(split.labels):
                found.update(f"{split.name(index)}\t{label}\n".encode())
            found.update(b"\n")
        return found.hexdigest()


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
    """What every source says. `in_memory`: reading costs nothing, so no process of its own does it."""

    in_memory: ClassVar[bool] = False

    name: str
    batch_size: int = Field(64, ge=1, description="images per step, over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="images per process at a time; gradients accumulate to batch_size; null: all at once"
    )
    eval_batch_size: int | None = Field(
        None, ge=1, description="images per process at a time in evaluation; null: the share of batch_size"
    )
    workers: int | None = Field(
        None, ge=0, description="processes that read images, for each process that trains; null: by the cores there are"
    )

    def load(self, all_labelled: bool) -> Splits:
        """Reads the source. UserError where it is missing or damaged.

        `all_labelled`: where the benchmark's own protocol does so (VTAB-1k), val's images train as well.
        """
        raise NotImplementedError

    def class_count(self) -> int | None:
        """How many classes there are, without a look at the source; None where only the source knows."""
        return None

    def transforms(self) -> Transforms:
        """What stands between the source's pictures and the model, without a look at the source.

        UserError where it cannot be said so; then the source cannot be packed.
        """
        raise UserError(f"data.name = {self.name!r}: has no transforms apart from its images, so it cannot be packed")

    def accumulation(self, ranks: int | None = None) -> int:
        """Micro-batches per step, on so many ranks, or on those there are. ConfigError where they do not divide it."""
        world = ranks or dist.world_size()
        share, rest = divmod(self.batch_size, world)
        if rest:
            near = self.batch_size - rest or world
            fitting = [n for n in range(1, world) if not self.batch_size % n][-3:]
            message = f"{world} ranks cannot share it equally ({rest} left over): {near} or {near + world} would fit"
            message += f", or {' or '.join(map(str, fitting))} ranks"
            raise ConfigError(Problem("data.batch_size", message, self.batch_size))
        micro = self.micro_batch_size or share
        if share % micro:
            message = f"must divide the {share} images of each process (batch_size {self.batch_size} / world_size)"
            raise ConfigError(Problem("data.micro_batch_size", message, micro))
        return share // micro

    def eval_size(self) -> int:
        """Images per process at a time in evaluation."""
        return self.eval_batch_size or -(-self.batch_size // dist.world_size())

    def reading_processes(self) -> int:
        if self.workers is not None or self.in_memory:
            return self.workers or 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(MOST_WORKERS, cores // dist.local_world_size() - 1))
