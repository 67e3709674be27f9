"""Figures of a split: against scikit-learn and a loop by hand, and the same over any number of ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import together
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from snell_dist import dist, meeting
from snell_dist.data.digits import Digits
from snell_dist.evaluate import Measured, evaluate

CLASSES = 9


class Table:
    """Image i is its own row of logits."""

    augments = False

    def __init__(self, size: int) -> None:
        draw = np.random.default_rng(size)
        self.labels = draw.integers(CLASSES, size=size).tolist()
        self.logits = torch.tensor(draw.normal(size=(size, CLASSES)) * 2, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.logits[index].view(CLASSES, 1, 1), self.labels[index]


class Engine:
    device = torch.device("cpu")
    model = torch.nn.Identity()


def measure(size: int, batch: int) -> Measured:
    return measured(Table(size), batch)


def measured(table: Table, batch: int) -> Measured:
    engine: Any = Engine()
    data = Digits(name="digits", eval_batch_size=batch)
    return evaluate(engine, lambda batch: batch.images.flatten(1), table, CLASSES, data)  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "batch"), [(230, 16), (230, 230), (41, 7)])
def test_figures_are_those_of_scikit_learn_and_of_a_loop(size: int, batch: int) -> None:
    found, table = measure(size, batch), Table(size)
    labels, logits = np.array(table.labels), table.logits.double()
    probabilities = logits.softmax(1).numpy()
    said, confidence = probabilities.argmax(1), probabilities.max(1)
    right = said == labels
    assert found.metrics["accuracy"] == pytest.approx(right.mean())
    top5 = top_k_accuracy_score(labels, logits.numpy(), k=5, labels=range(CLASSES))
    assert found.metrics["accuracy_top5"] == pytest.approx(top5)
    assert found.metrics["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, said))
    assert found.metrics["loss"] == pytest.approx(-np.log(probabilities[range(size), labels]).mean(), rel=1e-5)
    gaps = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            gaps += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.metrics["calibration_error"] == pytest.approx(gaps, abs=1e-5)
    assert found.label.tolist() == table.labels, "in the split's order"
    assert found.predicted.tolist() == said.tolist()
    np.testing.assert_allclose(found.confidence.numpy(), confidence, rtol=1e-5)


def test_a_class_without_images_has_no_part_in_the_mean_of_classes() -> None:
    """Though images of others are taken for it."""
    table = Table(60)
    table.labels = [label % 6 for label in table.labels]
    said = table.logits.argmax(1).numpy()
    assert {6, 7, 8} & {*said.tolist()}
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        expected = balanced_accuracy_score(table.labels, said)
    assert measured(table, 16).metrics["mean_per_class"] == pytest.approx(expected)


def test_a_model_that_says_nothing_is_not_right_among_five() -> None:
    """Of equal classes the first five count, as the first one does in top-1; nan is never right."""
    table = Table(230)
    table.logits = torch.zeros(230, CLASSES)
    found = measured(table, 64).metrics
    labels = np.array(table.labels)
    assert found["accuracy"] == pytest.approx((labels == 0).mean())
    assert found["accuracy_top5"] == pytest.approx((labels < 5).mean())
    table.logits[:] = torch.nan
    assert measured(table, 64).metrics["accuracy_top5"] == 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_figures(ranks: int, tmp_path: Path) -> None:
    """230 images in batches of 16: the last batch of two and of three ranks is short, and on some rank empty."""
    together(ranks, written, tmp_path)
    found = [(tmp_path / f"{rank}.json").read_text() for rank in range(ranks)]
    assert found == [said(measure(230, 16))] * ranks


def written(folder: Path) -> None:
    with meeting.process_group(torch.device("cpu")):
        (folder / f"{dist.rank()}.json").write_text(said(measure(230, 16)))


def said(found: Measured) -> str:
    return json.dumps([found.metrics, found.predicted.tolist()])
