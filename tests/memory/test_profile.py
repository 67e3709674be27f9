"""`snell profile` as a user calls it, and what `snell plan` learns from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ENVIRONMENT, TINY

from snell_dist.cli import main
from snell_dist.footprint import Footprint

CPU = ["profile", "demo", *TINY]


def profiled(capsys: pytest.CaptureFixture[str], history: Path, *words: str) -> dict[str, Any]:
    assert main([*CPU, *words, "--history", str(history), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_prediction_and_measurement_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = profiled(capsys, tmp_path / "history.jsonl")
    predicted, measured = Footprint.from_json(said["predicted"]), Footprint.from_json(said["measured"])
    assert abs(predicted.peak_bytes / measured.peak_bytes - 1) < 0.005
    assert abs(predicted.peak_bytes / said["allocated_bytes"] - 1) < 0.005
    assert [m.block for m in predicted.moments] == [m.block for m in measured.moments]
    for name, one, two in (*said["categories"], *said["blocks"]):
        assert abs(one - two) <= max(0.01 * two, 100), name
    assert said["recorded_s"] > 0 and said["device"] == {}


def test_errors_are_remembered_and_cited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = tmp_path / "runs/history.jsonl"
    for method in ("snell", "lora"):
        profiled(capsys, history, f"method.name={method}", "method.rank=8")
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["snell", "lora"]
    assert all(abs(line["error"]) < 0.02 and line["device"] == "cpu" for line in lines)
    lines[1] |= {"device": "cuda:0", "error": -0.125}
    history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--gpus", "1", "--gpu", "t4", "--history", str(history)]
    assert main(["plan", "demo", *TINY, "method.name=lora", "method.rank=8", *words]) == 0
    assert "of 1 earlier predictions of this method, engine and recomputation the worst was off by -12.50%" in (
        capsys.readouterr().out
    )


def test_text_has_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CPU, "--history", str(tmp_path / "history.jsonl")]) == 0
    text = capsys.readouterr().out
    for word in ("predicted", "as the allocator counts", "saved activations", "blocks.1", "a step takes"):
        assert word in text


def test_every_rank_says_its_own(tmp_path: Path) -> None:
    history = tmp_path / "history.jsonl"
    words = ["profile", "demo", *TINY, "engine.name=fsdp", "--history", str(history), "--json"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "snell_dist", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [said["rank"] for said in ranks] == [0, 1]
    for said in ranks:
        assert abs(said["predicted"]["peak_bytes"] / said["measured"]["peak_bytes"] - 1) < 0.01
    assert len(history.read_text().splitlines()) == 1 and json.loads(history.read_text())["ranks"] == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["method.rank=7"], ["method.rank = 7", "must be even"]),
        (["data.batch_size=12", "data.micro_batch_size=5"], ["data.micro_batch_size = 5", "must divide"]),
        (["method.targets=[qq]"], ["method.targets", "matches no linear layer"]),
    ],
)
def test_bad_settings_are_one_line(
    words: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = tmp_path / "history.jsonl"
    assert main([*CPU, *words, "--history", str(history)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts)
    assert not history.exists()


def test_a_foreign_history_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = tmp_path / "notes.txt"
    history.write_text("shopping list\n")
    assert main(["plan", "demo", *TINY, "--gpus", "1", "--gpu", "t4", "--history", str(history)]) == 2
    assert "is no history of predictions" in capsys.readouterr().err
    assert history.read_text() == "shopping list\n"
