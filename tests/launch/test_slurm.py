"""The batch scripts as they stand, under a real Slurm on two nodes, come to what one process comes to."""

from __future__ import annotations

import time
from pathlib import Path

import faults
import pytest
from conftest import ROOT
from slurm import Slurm
from training import ENVIRONMENT, RANKS, SETTINGS, Result, alone, steps, world_sizes

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(900)]
TWO = ["--nodes=2", "--gpus-per-node=1"]
MANY = 40  # steps


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return alone(tmp_path_factory.mktemp("one"))


def submit(slurm: Slurm, script: str, folder: Path, *overrides: str) -> int:
    """From a folder of its own, where a user's job leaves what it writes: runs/, and what it says."""
    words = [*TWO, f"--chdir={folder}", ROOT / f"launch/slurm/{script}.sbatch", "demo", *SETTINGS, *overrides]
    return slurm.submit(*words, env=ENVIRONMENT)


@pytest.mark.parametrize("script", ["torchrun", "tasks"])
def test_a_job_on_two_nodes(script: str, slurm: Slurm, one: Result, tmp_path: Path) -> None:
    job = slurm.wait(submit(slurm, script, tmp_path))
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
    assert job.out == tmp_path / f"snell-{job.number}.out"
    two = Result.read(tmp_path / f"runs/demo/{job.number}")
    assert two.world_sizes == [RANKS]
    assert two.differences(one) == []


def test_a_job_goes_on_after_a_rank_was_killed_and_after_a_warning(slurm: Slurm, tmp_path: Path) -> None:
    """By torchrun the first time; the second time the job saves and puts itself back into the queue."""
    number = submit(slurm, "torchrun", tmp_path, f"train.steps={MANY}")
    run = tmp_path / f"runs/demo/{number}"
    for n in (1, 2):
        while len(world_sizes(run)) < n or steps(run) < 3 * n:
            assert slurm.job(number).state in ("PENDING", "RUNNING"), slurm.job(number).output
            time.sleep(0.05)
        assert sorted(process.node for process in faults.agents(slurm.nodes)) == slurm.nodes.names
        assert {process.rank: process.node for process in faults.ranks(slurm.nodes)}.keys() == {0, 1}
        if n == 1:
            faults.kill_rank(slurm.nodes, 1)
        else:
            faults.warn(slurm, number)
    job = slurm.wait(number, restarts=1)
    assert (job.state, job.restarts) == ("COMPLETED", 1), job.output
    two = Result.read(run)
    assert two.world_sizes == [RANKS] * 3
    assert two.differences(alone(tmp_path / "one", f"train.steps={MANY}")) == []
