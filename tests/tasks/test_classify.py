"""Losses against torch's and timm's, over micro-batches and short batches; what mixes with what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from snell_dist import dist
from snell_dist.backbones.vit import Vit
from snell_dist.build import Built, build
from snell_dist.config import ConfigError, check
from snell_dist.data import PADDING, Batch
from snell_dist.feed import Feed
from snell_dist.run_config import Run
from snell_dist.tasks.classify import Classification, Classify

CPU = torch.device("cpu")
LAST = 2  # 267 images: 67 in the last step of an epoch of batches of 100


def config(task: dict[str, Any], **data: Any) -> Run:
    tree = {
        "backbone": {"name": "vit", **Vit.smallest},
        "task": {"name": "classify", **task},
        "method": {"name": "snell"},
        "data": {
            "name": "digits", "classes": [5, 6, 7], "image_size": 32, "channels": 3, "batch_size": 12,
        } | data,
        "train": {"steps": 3},
    }  # fmt: skip
    return check(tree, Run)


def batches(made: Built, given: Run, step: int) -> list[Batch]:
    return list(Feed(made.splits.train, given.data, 0, step, step + 1).step())


def one_step(given: Run, step: int = 0) -> tuple[Built, Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of one step."""
    made = build(given, None, CPU)
    made.engine.model.train()
    dist.seed_everything(0, step)
    loss = made.task.step(made.engine, batches(made, given, step))
    parameters = dict(made.engine.model.named_parameters())
    return made, loss, {name: parameters[name].grad for name in made.trainable}


def prepared(classes: int = 4, **task: Any) -> Classification:
    section = check({"name": "classify", **task}, Classify)
    return Classification(classes, section.label_smoothing, section._mix(classes))


def batch(*labels: int) -> Batch:
    """Images that differ in every pixel."""
    torch.manual_seed(1)
    return Batch(torch.rand(len(labels), 3, 8, 8), torch.tensor(labels), total=len(labels), last=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("data", [{}, {"micro_batch_size": 4}, {"batch_size": 100, "micro_batch_size": 20}])
def test_the_loss_is_torchs_over_the_whole_batch(data: dict[str, Any], smoothing: float) -> None:
    """In micro-batches too, and in an epoch's last batch, which is padded to equal ones."""
    given, step = config({"label_smoothing": smoothing}, **data), LAST if data.get("batch_size") else 0
    made, loss, gradients = one_step(given, step)
    seen = batches(made, given, step)
    labels = torch.cat([b.labels for b in seen])
    assert (labels == PADDING).any() == (step == LAST)
    logits = made.engine.model(torch.cat([b.images for b in seen]))
    expected = cross_entropy(logits, labels, ignore_index=PADDING, label_smoothing=smoothing)
    assert_close(loss, expected.detach())
    parameters = [made.engine.model.get_parameter(name) for name in gradients]
    for mine, theirs in zip(gradients.values(), torch.autograd.grad(expected, parameters), strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert_close(
        made.task.loss(made.engine.model, seen[0]),
        cross_entropy(
            made.engine.model(seen[0].images), seen[0].labels, ignore_index=PADDING, label_smoothing=smoothing
        ),
    )


@pytest.mark.parametrize("labels", [(0, 1, 2, 3), (0, 1, 2, 3, 0), (0, 1, 2, 3, PADDING), (2, PADDING), (PADDING,) * 2])
def test_mixup_mixes_images_and_targets_alike_and_real_ones_only(labels: tuple[int, ...]) -> None:
    """The share of each image is found from its pixels; its target must agree."""
    given, pairs = batch(*labels), sum(label != PADDING for label in labels) // 2 * 2
    before = given.images.clone()
    dist.seed_everything(0, 0)
    mixed = prepared(mixup=1.0, label_smoothing=0.2).mixed(given)
    assert torch.equal(mixed.images[pairs:], before[pairs:]), "an odd image and padding stay"
    for i, target in enumerate(mixed.labels):
        if labels[i] == PADDING:
            assert not target.any()
            continue
        expected = torch.full((4,), 0.2 / 4)
        share, other = 1.0, i
        if i < pairs:
            other = pairs - 1 - i
            toward = before[other] - before[i]
            share = 1 - ((mixed.images[i] - before[i]) * toward).sum() / toward.square().sum()
            assert 0.01 < share < 0.99
            assert_close(mixed.images[i], share * before[i] + (1 - share) * before[other])
        expected[labels[i]] += 0.8 * share
        expected[labels[other]] += 0.8 * (1 - share)
        assert_close(target, expected)


def test_cutmix_gives_each_image_the_share_of_its_pixels() -> None:
    given = batch(0, 1, 2, 3, PADDING)
    before = given.images.clone()
    dist.seed_everything(0, 3)
    mixed = prepared(cutmix=1.0).mixed(given)
    shares = []
    for i in range(4):
        own, others = mixed.images[i] == before[i], mixed.images[i] == before[3 - i]
        assert (own | others).all()
        shares.append(own.float().mean())
        assert_close(mixed.labels[i, i], shares[-1])
        assert_close(mixed.labels[i, 3 - i], 1 - shares[-1])
    assert 0 < shares[0] < 1


def test_the_two_take_turns_and_may_rest() -> None:
    task = prepared(mixup=0.8, cutmix=1.0, mixup_prob=0.6)
    kinds = []
    for step in range(60):
        dist.seed_everything(0, step)
        given = batch(0, 1, 2, 3)
        before = given.images.clone()
        after = task.mixed(given).images
        still = (after == before).float().mean().item()
        kinds.append("rests" if still == 1 else "cutmix" if still > 0 else "mixup")
    assert set(kinds) == {"rests", "cutmix", "mixup"}
    assert 15 <= kinds.count("rests") <= 33, "four in ten, and cutmix of no pixel"


@pytest.mark.parametrize("data", [{}, {"micro_batch_size": 3}, {"batch_size": 100, "micro_batch_size": 20}])
def test_a_step_on_mixed_images_is_timms_loss_on_them(data: dict[str, Any]) -> None:
    """And the same draws come again with the same (seed, step)."""
    task = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
    given, step = config(task, **data), LAST if data.get("batch_size") else 0
    made, loss, gradients = one_step(given, step)
    dist.seed_everything(0, step)
    seen = [made.task.mixed(b) for b in batches(made, given, step)]
    images, targets = torch.cat([b.images for b in seen]), torch.cat([b.labels for b in seen])
    real = targets.sum(1) > 0
    assert int(real.sum()) == seen[0].total
    expected = SoftTargetCrossEntropy()(made.engine.model(images[real]), targets[real])
    assert_close(loss, expected.detach())
    parameters = [made.engine.model.get_parameter(name) for name in gradients]
    for mine, theirs in zip(gradients.values(), torch.autograd.grad(expected, parameters), strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    _, again, _ = one_step(given, step)
    assert torch.equal(again, loss)
    _, plain, _ = one_step(config({"label_smoothing": 0.1}, **data), step)
    assert not torch.isclose(plain, loss)


def test_settings_out_of_range_are_said() -> None:
    with pytest.raises(ConfigError) as caught:
        config({"label_smoothing": 1.0, "mixup": -1, "cutmixup": 1})
    text = str(caught.value)
    assert "task.label_smoothing = 1.0: must be less than 1" in text
    assert "task.mixup = -1" in text
    assert "task.cutmixup = 1: unknown key, did you mean 'cutmix'?" in text
