"""A sharded model begins on one rank of a node: the others never hold it whole."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import ENVIRONMENT, ROOT


def test_only_the_reader_holds_the_whole_model(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "profiling/bench_start.py", "--size", "base", "--processes", "2"]
    done = subprocess.run(
        [*command, "--only", "fsdp", "--out", tmp_path / "start"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "start.json").read_text())
    reader, other = report["engines"]["fsdp"]
    whole = report["model"]["bytes"]
    assert 0.9 * whole < reader["peak_bytes"] < 1.3 * whole
    assert 0.4 * whole < other["peak_bytes"] < 0.9 * whole, "half of it, and a block on its way"
    assert other["engine_bytes"] < 0.6 * whole
