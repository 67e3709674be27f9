"""Real processes under torchrun: the same YAML gives the same numbers on one process and on two."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, TINY, train, trained


def torchrun(out: Path, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "-m", "snell_dist", "train", "demo", *TINY, "method.rank=4", *overrides, "--out", str(out)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize("micro", ["null", "3"])
def test_two_processes_equal_one_that_accumulates(micro: str, tmp_path: Path) -> None:
    done = torchrun(tmp_path / "two", f"data.micro_batch_size={micro}")
    assert done.returncode == 0, done.stderr
    two = trained(tmp_path / "two" / "demo" / "001")
    pieces = 6 if micro == "null" else 3
    one = trained(train(tmp_path / "one", "method.rank=4", f"data.micro_batch_size={pieces}").folder)
    assert two.keys() == one.keys()
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-5, atol=1e-6)
    lines = [line for line in done.stderr.splitlines() if line.startswith("step 6/6")]
    assert len(lines) == 1, "one process speaks"


def test_a_mistake_under_torchrun_is_said_and_ends_all(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "data.batch_size=13")
    assert done.returncode != 0
    assert "data.batch_size = 13: must be a multiple of world_size 2" in done.stderr
    assert not any(tmp_path.iterdir())
