"""The measurement is fair: ours and what is done by hand train the same model on the same batches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

TINY = ["backbone.width=16", "backbone.depth=2", "backbone.heads=2", "backbone.image_size=8", "data.image_size=8"]


def test_ours_and_by_hand_have_equal_losses(tmp_path: Path) -> None:
    engines = ["ddp", "fsdp shard", "zero 2"]
    command = [sys.executable, ROOT / "profiling/bench_engines.py", "--rounds", "2", "--only", *engines]
    done = subprocess.run(
        [*map(str, command), "--out", str(tmp_path / "engines"), "--set", *TINY, "train.log_every=1"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "engines.json").read_text())
    table = (tmp_path / "engines.md").read_text()
    assert [found["engine"] for found in report["engines"]] == engines
    for found in report["engines"]:
        assert len(found["losses"]) == 5, "two turns to warm up, one to count, two rounds"
        assert all(ours == pytest.approx(theirs, rel=1e-4) for ours, theirs in found["losses"])
        assert found["ratio"]["least"] <= found["ratio"]["median"] <= found["ratio"]["most"]
        assert f"{found['ratio']['median']:.3f}" in table
        calls, sizes = found["calls"], found["bytes"]
        assert calls.keys() == sizes.keys() == {"ours", "by hand"}
        assert sum(sizes["by hand"].values()) > 0
        assert sum(sizes["ours"].values()) <= 1.05 * sum(sizes["by hand"].values()) + 1024
