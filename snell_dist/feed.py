"""Who sees which image when: the order of training, each rank's share, and evaluation, which sees every image once.

The order is a pure function of (seed, step): the global batch of a step is a slice of its epoch's permutation,
whatever the number of ranks and of processes that read. An augmented image is a function of (seed, epoch, image).
So a resumed run continues exactly where it stood, with nothing to save.
"""

from __future__ import annotations

import functools
import random
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from snell_dist import dist, heartbeat
from snell_dist.config import UserError
from snell_dist.data import PADDING, Batch, DataSection, Images

Draw = tuple[int, int]  # (index, epoch); the index PADDING is no image


def steps_per_epoch(images: Images, batch_size: int) -> int:
    """The last, smaller batch is kept."""
    return -(-len(images) // batch_size)


def batch_indices(size: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Indices of the global batch of a step, as a function of (seed, step) alone."""
    epoch, position = divmod(step, -(-size // batch_size))
    return _epoch_order(size, epoch, seed)[position * batch_size : (position + 1) * batch_size].tolist()


@functools.lru_cache(maxsize=1)
def _epoch_order(size: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


class Feed:
    """This rank's training batches from step `start` to before `stop`. Ranks get equally many images a batch.

    `shared`: instead, every rank gets all of a step's micro-batches.
    """

    def __init__(
        self, images: Images, data: DataSection, seed: int, start: int, stop: int, shared: bool = False
    ) -> None:
        self._size, self._batch_size, self._seed, self._step = len(images), data.batch_size, seed, start
        self._ranks, self._rank = (1, 0) if shared else (dist.world_size(), dist.rank())
        self._pieces = data.accumulation() * (dist.world_size() if shared else 1)
        self._batches = _read(images, data, seed, self._plan(start, stop), self._pieces)
        self._waited_s = 0.0

    def step(self) -> Iterator[Batch]:
        """The micro-batches of the next step."""
        total = len(self._indices(self._step))
        self._step += 1
        for piece in range(self._pieces):
            heartbeat.enter("data")
            begin = time.perf_counter()
            images, labels = next(self._batches)
            self._waited_s += time.perf_counter() - begin
            heartbeat.enter("forward")
            yield Batch(images, labels, total=total, last=piece == self._pieces - 1)

    def waited_s(self) -> float:
        """Seconds that training waited for images since this was last asked."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def _indices(self, step: int) -> list[int]:
        return batch_indices(self._size, self._batch_size, step, self._seed)

    def _plan(self, start: int, stop: int) -> Iterator[list[Draw]]:
        for step in range(start, stop):
            indices, epoch = self._indices(step), step // -(-self._size // self._batch_size)
            size = -(-len(indices) // (self._pieces * self._ranks))
            for piece in range(self._pieces):
                first = (piece * self._ranks + self._rank) * size
                mine = [(index, epoch) for index in indices[first : first + size]]
                yield mine + [(PADDING, epoch)] * (size - len(mine))


def every_once(images: Images, data: DataSection) -> Iterator[Batch]:
    """This rank's share of an evaluation: every image once over all ranks, equally many batches on each."""
    count, ranks, size = len(images), dist.world_size(), data.eval_size()
    starts = range(0, count, size * ranks)

    def plan() -> Iterator[list[Draw]]:
        for start in starts:
            first = start + dist.rank() * size
            mine = [(index, 0) for index in range(min(first, count), min(first + size, count))]
            yield mine + [(PADDING, 0)] * (min(size, count - start) - len(mine))  # up to the fullest rank's share

    for start, (pixels, labels) in zip(starts, _read(images, data, 0, plan(), 1), strict=True):
        yield Batch(pixels, labels, total=count, last=start == starts[-1])


def _read(
    images: Images, data: DataSection, seed: int, plan: Iterable[list[Draw]], ahead: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The planned batches in order, read by other processes where the section says so."""
    workers = data.reading_processes()
    loader: DataLoader = DataLoader(
        _Drawn(images, seed),  # type: ignore[arg-type]
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=max(2, ahead) if workers else None,
        worker_init_fn=_quiet,
        generator=torch.Generator(),  # else starting it would move the global generator
    )
    for batch in loader:
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch


@dataclass(frozen=True)
class _Drawn:
    """Images by (index, epoch). An image that cannot be read is its error's message, to cross processes whole."""

    images: Images
    seed: int

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int] | str:
        index, epoch = draw
        try:
            if index == PADDING:
                return self.images[0][0], PADDING
            if not self.images.augments:
                return self.images[index]
            with _randomness(self.seed, epoch, index):
                return self.images[index]
        except UserError as error:
            return str(error)


class _randomness:
    """Within it, torch's and Python's random numbers are a function of the given ones; afterwards as before."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def __enter__(self) -> None:
        self._before = torch.get_rng_state(), random.getstate()
        state = np.random.SeedSequence(self._numbers).generate_state(2)
        torch.random.default_generator.manual_seed(int(state[0]) << 32 | int(state[1]))
        random.seed(int(state[1]))

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self._before[0])
        random.setstate(self._before[1])


def _collate(items: list[tuple[Tensor, int] | str]) -> tuple[Tensor, Tensor] | str:
    for item in items:
        if isinstance(item, str):
            return item
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


def _quiet(worker: int) -> None:
    """Who trains decides when to stop: Ctrl-C and SIGTERM reach the whole group, and a reader must outlive them.

    It does not outlive its rank, even where it is stuck.
    """
    for number in dist.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    dist.end_with_parent(signal.SIGKILL)
