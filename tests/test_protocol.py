"""Which weights a run reports: best on val, last, or best on test as released; and what it says of that."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, train, trained

from snell_dist.adapter import ADAPTER
from snell_dist.adapter import load as load_adapter
from snell_dist.build import build
from snell_dist.checkpoint import newest
from snell_dist.config import ConfigError, load
from snell_dist.run_config import Run, Train
from snell_dist.selection import Selection

LOOKS = ["method.rank=4", "train.steps=24", "train.save_every=8", "train.eval_every=4", "optim.schedule=constant"]


def looks(folder: Path | None, key: str) -> dict[int, float]:
    """Steps done to accuracy, of each look."""
    assert folder is not None
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"] + 1: record[key] for record in records if key in record}


def accuracy(folder: Path, split: str) -> float:
    """Of the adapter file that the run left, measured anew."""
    config = load(str(folder / "config.yaml"), [], Run).config
    built = build(config, None, torch.device("cpu"))
    built.engine.load_weights(load_adapter(folder / ADAPTER, built.engine.weights(), built.fingerprint))
    return built.task.evaluate(built.engine, getattr(built.splits, split), config.data).metrics["accuracy"]


@pytest.mark.parametrize(("select", "split"), [("val", "val"), ("paper_compat", "test")])
def test_the_best_look_is_reported(select: str, split: str, tmp_path: Path) -> None:
    outcome = train(tmp_path, *LOOKS, f"protocol.select={select}")
    assert outcome.folder is not None
    found = looks(outcome.folder, f"{split}_accuracy")
    assert sorted(found) == [4, 8, 12, 16, 20, 24]
    best = max(found, key=lambda step: (found[step], -step))
    assert accuracy(outcome.folder, split) == found[best]
    assert outcome.summary["test_accuracy"] == accuracy(outcome.folder, "test")
    card = outcome.summary["protocol"]
    assert f"after step {best} of 24" in card["chosen"]
    assert card["marked"] is (select == "paper_compat")
    assert card["test_looks"] == (6 if select == "paper_compat" else 1)


@pytest.mark.parametrize(("select", "kept"), [("val", 4), ("paper_compat", 4), ("last", 8)])
def test_the_earliest_of_the_best_looks_stays(select: str, kept: int, tmp_path: Path) -> None:
    """Also over a break between the looks, which a new process begins."""
    config = load("demo", [*TINY, "method.rank=4", "train.steps=8", f"protocol.select={select}"], Run).config
    built = build(config, None, torch.device("cpu"))
    weight = built.engine.model.get_parameter("head.weight")
    for done, accuracy in ((2, 0.5), (4, 0.75), (6, 0.75), (8, 0.25)):
        with torch.no_grad():
            weight.fill_(done)
        Selection(config, tmp_path, built).consider(done, accuracy)
    selection = Selection(config, tmp_path, built)
    selection.restore()
    assert selection.step == kept
    assert (weight == kept).all()


def test_last_reports_the_last_weights(tmp_path: Path) -> None:
    outcome = train(tmp_path, *LOOKS, "protocol.select=last")
    assert outcome.folder is not None
    found = newest(outcome.folder)
    assert found is not None
    state = found.tensors("model/")
    assert all(torch.equal(tensor, state[f"model/{name}"]) for name, tensor in trained(outcome.folder).items())
    assert outcome.summary["protocol"]["chosen"] == "last weights, after step 24"


def test_a_resumed_run_selects_as_the_uninterrupted_one(tmp_path: Path) -> None:
    """The best look may lie before the break, and the newest checkpoint after it."""
    whole = train(tmp_path / "whole", *LOOKS)
    assert whole.folder is not None
    for kept in (8, 16):  # as a kill would have left it
        parts = tmp_path / f"parts{kept}"
        shutil.copytree(whole.folder, parts)
        (parts / "summary.json").unlink()
        for checkpoint in (parts / "checkpoints").glob("step_*"):
            if int(checkpoint.name.removeprefix("step_")) > kept:
                shutil.rmtree(checkpoint)
        again = train(tmp_path, *LOOKS, folder=parts, resume=True)
        assert again.summary["protocol"] == whole.summary["protocol"]
        assert again.summary["test_accuracy"] == whole.summary["test_accuracy"]


def test_the_moving_average_is_looked_at_and_reported(tmp_path: Path) -> None:
    """Against the average by hand of the weights after each step, which runs of every length leave."""
    said = ["method.name=linear", "optim.schedule=constant", "optim.lr=0.1", "protocol.select=last"]
    decay, steps = 0.5, 4
    after = [trained(train(tmp_path, *said, f"train.steps={n}").folder) for n in range(1, steps + 1)]
    config = load("demo", [*TINY, *said], Run).config
    expected = {
        name: t.clone() for name, t in build(config, None, torch.device("cpu")).engine.model.state_dict().items()
    }
    for weights in after:
        for name, tensor in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
    averaged = ["optim.ema_decay=0.5", f"train.steps={steps}", "train.save_every=1"]
    outcome = train(tmp_path, *said, *averaged)
    for name, tensor in trained(outcome.folder).items():
        torch.testing.assert_close(tensor, expected[name])
    assert outcome.folder is not None
    (outcome.folder / "summary.json").unlink()
    (outcome.folder / "best.safetensors").unlink()
    shutil.rmtree(outcome.folder / f"checkpoints/step_{steps:08d}")
    again = train(tmp_path, *said, *averaged, folder=outcome.folder, resume=True)
    for name, tensor in trained(again.folder).items():
        torch.testing.assert_close(tensor, expected[name])


def test_looks_are_where_they_were_asked_for() -> None:
    at = {
        "by steps": (Train(steps=10, eval_every=4), 5, [4, 8, 10]),
        "by epochs": (Train(epochs=5, eval_epochs=2), 3, [6, 12, 15]),
        "last epochs too": (Train(epochs=6, eval_epochs=3, eval_last_epochs=2), 2, [6, 10, 12]),
        "only at the end": (Train(steps=7), 3, [7]),
    }
    for what, (section, epoch, expected) in at.items():
        steps = section.total_steps(epoch)
        assert [done for done in range(1, steps + 1) if section.looks(done, epoch)] == expected, what


def test_released_looks_are_every_tenth_and_the_last_ten_epochs() -> None:
    section = Train(epochs=100, eval_epochs=10, eval_last_epochs=10)
    epochs = [done // 7 for done in range(1, 701) if section.looks(done, 7)]
    assert epochs == [10, 20, 30, 40, 50, 60, 70, 80, 90, *range(91, 101)]


@pytest.mark.parametrize("said", [["train.epochs=3"], ["train.steps=null"]])
def test_the_length_is_said_once(said: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train.*must say either steps or epochs"):
        load("demo", [*TINY, *said], Run)


def test_the_card_says_what_the_data_was(tmp_path: Path) -> None:
    one = train(tmp_path, "method.rank=4").summary["protocol"]
    other = train(tmp_path, "method.rank=4", "data.classes=[5,6,7,8]").summary["protocol"]
    assert one["data_sha256"] != other["data_sha256"]
    assert one["epochs"] == pytest.approx(6 * 12 / one["train_images"], rel=0.02)
    assert {"dataset", "split", "resize", "normalisation", "seed", "select", "chosen"} <= set(one)
