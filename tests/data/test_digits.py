"""Digits: splits that hold whatever the classes, and pictures that hold the same image."""

import torch

from snell_dist.data.digits import Digits


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


def test_a_picture_is_the_image() -> None:
    """16 levels of ink, a picture's steps of 15: exactly what scikit-learn stores."""
    from torchvision.transforms.functional import pil_to_tensor

    test = Digits(name="digits").load(False).test
    for index in (0, 7, 100):
        assert torch.equal(pil_to_tensor(test.picture(index)).float() / 15 / 8 - 1, test[index][0])
    assert len({test.name(index) for index in range(len(test))}) == len(test)
