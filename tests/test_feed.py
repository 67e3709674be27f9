"""The order of training images is a function of (seed, step); evaluation sees every image once."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snell_dist.config import UserError
from snell_dist.data import PADDING
from snell_dist.data.digits import Digits
from snell_dist.feed import Feed, batch_indices, every_once


class Numbers:
    """Image i is a tensor that holds i."""

    augments = False

    def __init__(self, size: int) -> None:
        self.labels = range(size)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 1, 1), float(index)), index


def as_rank(monkeypatch, rank: int, world_size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


@given(size=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_shows_every_image_once(size: int, batch: int, seed: int, epoch: int) -> None:
    steps = -(-size // batch)
    seen = [i for step in range(epoch * steps, (epoch + 1) * steps) for i in batch_indices(size, batch, step, seed)]
    assert sorted(seen) == list(range(size))


def test_seeds_and_epochs_differ() -> None:
    first = [batch_indices(50, 50, step, seed) for step in (0, 1) for seed in (0, 1)]
    assert len({tuple(order) for order in first}) == 4


def test_any_number_of_processes_sees_the_same_step(monkeypatch) -> None:
    dataset = Numbers(43)  # the fifth batch of 12 has 7 images
    for step in range(8):
        steps = []
        for world_size, micro in ((1, None), (1, 3), (2, None), (2, 3), (4, 1)):
            data = Digits(name="digits", batch_size=12, micro_batch_size=micro)
            labels, shapes = [], set()
            for rank in range(world_size):
                as_rank(monkeypatch, rank, world_size)
                batches = list(Feed(dataset, data, 0, step, step + 1).step())
                assert [b.last for b in batches] == [False] * (len(batches) - 1) + [True]
                labels += [i for b in batches for i in b.labels.tolist() if i != PADDING]
                shapes |= {len(b.labels) for b in batches}
                assert all(b.total == len(batch_indices(43, 12, step, 0)) for b in batches)
                assert all((b.images.flatten() == b.labels)[b.labels != PADDING].all() for b in batches)
            assert len(shapes) == 1, "ranks and micro-batches are equally large"
            steps.append(sorted(labels))
        assert all(labels == steps[0] for labels in steps)


def test_evaluation_sees_every_image_once_and_equally_many_batches(monkeypatch) -> None:
    for size in (1, 5, 16, 17, 30):
        for world_size in (1, 2, 3):
            seen, counts = [], set()
            for rank in range(world_size):
                as_rank(monkeypatch, rank, world_size)
                batches = list(every_once(Numbers(size), Digits(name="digits", eval_batch_size=8)))
                counts.add(tuple(len(b.labels) for b in batches))
                seen += [i for b in batches for i in b.labels.tolist() if i != PADDING]
            assert sorted(seen) == list(range(size))
            assert len(counts) == 1


class Drawn(Numbers):
    """Image i is i and random numbers; image 13 cannot be read."""

    augments = True

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 13:
            raise UserError("thirteen.png: is empty")
        return torch.tensor([index, torch.rand(()), random.random()]).view(3, 1, 1), index


def drawn(start: int, workers: int) -> list[torch.Tensor]:
    """The images of steps `start` to 7, in order."""
    data = Digits(name="digits", batch_size=5, workers=workers)
    feed = Feed(Drawn(13), data, 4, start, 7)
    return [batch.images for _ in range(start, 7) for batch in feed.step()]


def test_augmented_images_are_a_function_of_seed_epoch_and_image() -> None:
    """Whoever reads, wherever training begins; and each epoch draws anew."""
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate()
    whole = drawn(0, workers=0)
    for images, again in ((whole, drawn(0, workers=2)), (whole[4:], drawn(4, workers=1)), (whole[2:], drawn(2, 0))):
        assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    assert torch.equal(before[0], torch.get_rng_state()), "reading leaves the generators as they were"
    assert before[1] == random.getstate()
    values = [tuple(image.flatten().tolist()) for batch in whole for image in batch]
    assert len(set(values)) == len(values), "an image of another epoch is drawn anew"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_one_line(workers: int) -> None:
    data = Digits(name="digits", batch_size=7, workers=workers)
    with pytest.raises(UserError, match=r"^thirteen\.png: is empty$"):
        feed = Feed(Drawn(14), data, 0, 0, 2)
        for _ in range(2):
            list(feed.step())
    with pytest.raises(UserError, match=r"^thirteen\.png: is empty$"):
        list(every_once(Drawn(14), data))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_no_sample_is_lost_or_doubled_wherever_training_stops_and_goes_on(data: st.DataObject) -> None:
    """Ranks x reading processes x micro-batches x a break: the epochs' images, each once."""
    size, ranks, micro = (
        data.draw(st.integers(*r), label=n) for n, r in (("size", (1, 60)), ("ranks", (1, 4)), ("micro", (1, 3)))
    )
    batch = ranks * micro * data.draw(st.integers(1, 4), label="images")
    steps = -(-size // batch)
    stop = data.draw(st.integers(0, 2 * steps), label="break")
    seen: list[list[int]] = [[], []]
    with pytest.MonkeyPatch.context() as patched:
        for rank in range(ranks):
            as_rank(patched, rank, ranks)
            workers = data.draw(st.sampled_from([0, 0, 0, 1, 2]), label="workers")
            section = Digits(name="digits", batch_size=batch, micro_batch_size=micro, workers=workers)
            for start, end in ((0, stop), (stop, 2 * steps)):
                feed = Feed(Numbers(size), section, 3, start, end)
                for step in range(start, end):
                    seen[step // steps] += [i for b in feed.step() for i in b.labels.tolist() if i != PADDING]
    assert [sorted(epoch) for epoch in seen] == [list(range(size))] * 2


def test_readers_outlive_the_signals_that_ask_training_to_stop() -> None:
    """Ctrl-C reaches the whole process group; the step that is under way still gets its images."""
    feed = Feed(Numbers(64), Digits(name="digits", batch_size=4, workers=2), 0, 0, 16)
    for _ in range(2):  # one of each reader, which by then knows what to do with signals
        list(feed.step())
    for child in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(child.pid, number)
    assert sum(len(b.labels) for _ in range(14) for b in feed.step()) == 56


def test_waiting_is_counted_once() -> None:
    class Slow(Numbers):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            time.sleep(0.01)
            return super().__getitem__(index)

    feed = Feed(Slow(8), Digits(name="digits", batch_size=4), 0, 0, 2)
    list(feed.step())
    assert 0.04 <= feed.waited_s() < 0.5
    assert feed.waited_s() == 0
