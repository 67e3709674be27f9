"""The order of training images is a function of (seed, step); evaluation sees every image once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_digits_splits_are_disjoint_and_independent_of_the_chosen_classes() -> None:
    splits = Digits(name="digits", classes=[7, 5]).load(False)
    counts = [len(s) for s in (splits.train, splits.val, splits.test)]  # type: ignore[arg-type]
    assert sum(counts) == 179 + 182, "scikit-learn documents 179 sevens and 182 fives"
    assert splits.classes == ["seven", "five"]
    alone = Digits(name="digits", classes=[5, 0]).load(False)
    fives = [image for image, label in (splits.test[i] for i in range(len(splits.test))) if label == 1]
    same = [image for image, label in (alone.test[i] for i in range(len(alone.test))) if label == 0]
    assert torch.equal(torch.stack(fives), torch.stack(same))
    image, _ = splits.train[0]
    assert image.shape == (1, 8, 8)
    assert image.min() >= -1
    assert image.max() <= 1
