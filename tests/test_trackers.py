"""Trackers get what metrics.jsonl gets: read back by the trackers' own readers."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, TINY, snell, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from snell_dist.config import ConfigError
from snell_dist.observers import trackers


def losses(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records}


def test_tensorboard_reads_the_losses_also_of_a_resumed_run(tmp_path: Path) -> None:
    said = ["method.rank=4", "train.track=[tensorboard]"]
    folder = train(tmp_path, *said).folder
    assert folder is not None
    (folder / "summary.json").unlink()
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoints/step_{step:08d}")
    train(tmp_path, *said, folder=folder, resume=True)
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"loss", "lr", "images_per_s", "data_wait", "val_accuracy"} <= set(events.Tags()["scalars"])
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx(losses(folder))
    assert len(events.Scalars("loss")) == len(found), "no step twice"


def records(file: Path) -> Iterator[bytes]:
    """wandb's file is LevelDB's log: 7 bytes, then 32 KiB blocks of (checksum 4, length 2, kind 1, data)."""
    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_offline_holds_the_losses(tmp_path: Path) -> None:
    """In a process of its own, as a user starts it."""
    from wandb.proto import wandb_internal_pb2

    folder = tmp_path / "run"
    environment = ENVIRONMENT | {"WANDB_MODE": "offline"}
    done = snell("train", "demo", *TINY, "method.rank=4", "train.track=[wandb]", "--folder", folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert "wandb:" not in done.stdout + done.stderr
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = {}
    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
        if "loss" in row:
            found[int(row["_step"])] = json.loads(row["loss"])
    assert found == pytest.approx(losses(folder))


def test_an_unreachable_service_does_not_stop_training(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "3"}
    environment = ENVIRONMENT | {"WANDB_MODE": "online", **nowhere}
    done = snell("train", "demo", *TINY, "method.rank=4", "train.track=[wandb]", "--folder", folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert "training goes on without it" in done.stderr
    assert (folder / "summary.json").exists()


def test_a_missing_library_is_one_line_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError, match=r"train\.track = 'wandb': is not installed: pip install 'snell_dist\[trackers\]'"
    ):
        trackers.check(["wandb"])
    with pytest.raises(ConfigError, match=r"train\.track"):
        train(tmp_path, "method.rank=4", "train.track=[wandb]")
    assert not os.listdir(tmp_path)
