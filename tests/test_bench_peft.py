"""The measurement is fair: the harness and PEFT train the same model on the same batches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

TINY = ["backbone.size=tiny", "backbone.width=16", "backbone.depth=2", "backbone.heads=2", "backbone.image_size=8"]


def test_peft_and_the_harness_have_equal_losses(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "profiling/bench_peft.py"), "--rounds", "2", "--out", str(tmp_path / "peft")]
    settings = [*TINY, "backbone.patch_size=2", "data.image_size=8", "method.rank=4", "train.log_every=1"]
    done = subprocess.run(
        [*command, "--set", *settings], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "peft.json").read_text())
    assert len(report["losses"]) == 5, "two turns to warm up, one to count, two rounds"
    assert all(ours == pytest.approx(theirs, rel=1e-5) for ours, theirs in report["losses"])
    assert report["ratio"]["least"] <= report["ratio"]["median"] <= report["ratio"]["most"]
    assert f"{report['ratio']['median']:.3f}" in (tmp_path / "peft.md").read_text()
