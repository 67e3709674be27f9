"""Pairs: against open_clip's losses, over micro-batches and over ranks, and what zero-shot accuracy means."""

from __future__ import annotations

import math
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.testing import assert_close

from snell_dist import dist
from snell_dist.backbones.clip import Clip
from snell_dist.build import Built, build
from snell_dist.config import check
from snell_dist.data import PADDING
from snell_dist.feed import Feed
from snell_dist.run_config import Run
from snell_dist.tasks.contrastive import class_directions, pairwise

CPU = torch.device("cpu")


def outputs(*sizes: int, bias: bool) -> list[list[Tensor]]:
    """What a model gives for micro-batches of these sizes."""
    torch.manual_seed(0)
    scalars = [torch.tensor(5.0), *([torch.tensor(-2.0)] if bias else [])]
    return [[normalize(torch.randn(n, 6), dim=-1), normalize(torch.randn(n, 6), dim=-1), *scalars] for n in sizes]


@pytest.mark.parametrize("sizes", [(8,), (3, 5), (2, 2, 2, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_open_clips(bias: bool, sizes: tuple[int, ...]) -> None:
    given = outputs(*sizes, bias=bias)
    loss, gradients = pairwise(given, torch.ones(8, dtype=torch.bool), total=8)
    whole = [torch.cat([g[i] for g in given]).requires_grad_() for i in (0, 1)]
    scalars = [scalar.clone().requires_grad_() for scalar in given[0][2:]]
    theirs = (open_clip.loss.SigLipLoss() if bias else open_clip.ClipLoss())(*whole, *scalars)
    assert_close(loss, theirs.detach())
    theirs.backward()
    for i, expected in enumerate(whole):
        assert_close(torch.cat([g[i] for g in gradients]), expected.grad)
    for i, scalar in enumerate(scalars, 2):
        assert_close(sum(g[i] for g in gradients), scalar.grad)


@pytest.mark.parametrize("bias", [False, True])
def test_padding_is_neither_a_row_nor_a_column(bias: bool) -> None:
    (padded,) = outputs(8, bias=bias)
    shorter = [[padded[0][:5], padded[1][:5], *padded[2:]]]
    loss, gradients = pairwise([padded], torch.arange(8) < 5, total=5)
    expected, others = pairwise(shorter, torch.ones(5, dtype=torch.bool), total=5)
    assert_close(loss, expected)
    for mine, other in zip(gradients[0], others[0], strict=True):
        assert_close(mine[:5] if mine.ndim else mine, other)
        assert not mine.ndim or not mine[5:].any()


def config(**sections: Any) -> Run:
    tree = {
        "backbone": {"name": "clip", **Clip.smallest, "templates": ["the digit {}"]},
        "task": {"name": "contrastive"},
        "method": {"name": "snell"},
        "data": {"name": "digits", "classes": [5, 6, 7], "image_size": 32, "channels": 3, "batch_size": 12},
        "train": {"steps": 3},
    }
    for key, value in sections.items():
        tree[key] = tree.get(key, {}) | value
    return check(tree, Run)


def one_step(given: Run, step: int = 0) -> tuple[Built, Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of one step."""
    made = build(given, None, CPU)
    made.engine.model.train()
    dist.seed_everything(0, step)
    loss = made.task.step(made.engine, Feed(made.splits.train, given.data, 0, step, step + 1).step())
    parameters = dict(made.engine.model.named_parameters())
    return made, loss, {name: parameters[name].grad for name in made.trainable}


@pytest.mark.parametrize("method", [{"name": "snell"}, {"name": "full"}])
@pytest.mark.parametrize("micro", [1, 4, 6])
def test_micro_batches_have_the_gradients_of_the_whole_batch(micro: int, method: dict[str, Any]) -> None:
    """Also against plain autograd through the model and open_clip's loss."""
    made, loss, whole = one_step(config(method=method))
    _, same, cut = one_step(config(method=method, data={"micro_batch_size": micro}))
    assert_close(same, loss)
    for name, gradient in whole.items():
        assert_close(cut[name], gradient, rtol=1e-4, atol=1e-6)
    (batch,) = Feed(made.splits.train, config().data, 0, 0, 1).step()
    captions = made.backbone.tokenized([f"the digit {made.splits.classes[i]}" for i in batch.labels.tolist()])
    images, texts, scale = made.engine.model(batch.images, captions)
    names = list(whole)
    parameters = dict(made.engine.model.named_parameters())
    expected = torch.autograd.grad(open_clip.ClipLoss()(images, texts, scale), [parameters[n] for n in names])
    for name, gradient in zip(names, expected, strict=True):
        assert_close(whole[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_short_last_batch_counts_its_images_only() -> None:
    """The epoch's last batch is padded to equal micro-batches."""
    given = config(data={"batch_size": 100, "micro_batch_size": 20})
    last = 2  # 267 images: 67 in the last step, 14 a micro-batch
    batches = list(Feed(build(given, None, CPU).splits.train, given.data, 0, last, last + 1).step())
    assert any((batch.labels == PADDING).any() for batch in batches)
    _, loss, gradients = one_step(given, last)
    _, expected, others = one_step(config(data={"batch_size": 100}), last)
    assert_close(loss, expected)
    for name, gradient in gradients.items():
        assert_close(gradient, others[name], rtol=1e-4, atol=1e-6)


def test_the_second_forward_draws_the_same_dropout() -> None:
    given = config(data={"micro_batch_size": 4}, method={"dropout": 0.5, "drop_path": 0.3})
    made = build(given, None, CPU)
    made.engine.model.train()
    seen: list[Tensor] = []
    forward = made.engine.forward

    def watched(*inputs: Any) -> Any:
        result = forward(*inputs)
        seen.append(result[0].detach())
        return result

    made.engine.forward = watched
    made.task.step(made.engine, Feed(made.splits.train, given.data, 0, 0, 1).step())
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, second)


def test_the_scale_stays_within_clips_bounds() -> None:
    made = build(config(method={"name": "full"}), None, CPU)
    scale = made.engine.model.get_parameter("logit_scale")
    for start, expected in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        with torch.no_grad():
            scale.fill_(start)
        made.task.after_step(made.engine)
        assert scale.item() == pytest.approx(expected)


def test_zero_shot_accuracy_is_the_nearest_mean_caption() -> None:
    """Against open_clip's own classifier of templates and class names, and a count by hand."""
    templates = ["the digit {}", "a photo of a {}."]
    given = config(backbone={"templates": templates})
    made = build(given, None, CPU)
    model: Any = made.engine.model.eval()
    said = [lambda name, template=template: template.format(name) for template in templates]
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(
            model, made.backbone.tokenized, made.splits.classes, said, num_classes_per_batch=None
        )  # [D, classes]
        assert_close(
            class_directions(lambda tokens: made.engine.forward(None, tokens)[1], made.task.tokens), classifier.t()
        )
        images, labels = zip(*(made.splits.test[i] for i in range(len(made.splits.test))), strict=True)
        chosen = (model.encode_image(torch.stack(images), normalize=True) @ classifier).argmax(1)
    hits = (chosen == torch.tensor(labels)).float().mean().item()
    assert made.task.evaluate(made.engine, made.splits.test, given.data).metrics["accuracy"] == pytest.approx(hits)
