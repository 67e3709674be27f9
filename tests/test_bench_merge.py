"""The study of a merge's memory, on one block of a ViT-L: what it claims of large models, to the tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bench_merge
from conftest import ENVIRONMENT
from finished_runs import finish


def test_a_merge_holds_one_extra_tensor(tmp_path: Path) -> None:
    name = "snell"
    shape = {"name": "vit", "size": "large", "image_size": 32, "depth": 1}
    finish(tmp_path / "run", shape, bench_merge.CASES[name][0], scale=bench_merge.SMALL)
    command = [sys.executable, bench_merge.__file__, "--case", name, str(tmp_path)]
    environment = ENVIRONMENT | bench_merge.GIVES_BACK
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["largest_bytes"] == 4 * 1024 * 4 * 1024  # fc1
    assert found["largest_bytes"] / 2 < found["peak_bytes"] < 2.2 * found["largest_bytes"]
    rows = {"size": "large", "depth": 1, "cases": {name: found | {"resident_bytes": 0}}}
    environment = {"date": "", "machine": "", "python": "", "versions": {}, "command": ""}
    assert f"| {name} | " in bench_merge.markdown(rows | {"environment": environment})
