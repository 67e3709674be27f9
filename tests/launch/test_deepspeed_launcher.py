"""DeepSpeed's launcher, over real pdsh and sshd or one a node by srun, comes to what one process comes to."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT
from nodes import Nodes
from slurm import Slurm
from ssh import Ssh
from training import ENVIRONMENT, RANKS, SETTINGS, Result, alone

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(1200)]
ZERO = ["engine.name=zero", "engine.stage=3"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return alone(tmp_path_factory.mktemp("one"))


def test_typed_on_one_of_two(nodes: Nodes, ssh: Ssh, one: Result, tmp_path: Path) -> None:
    hosts, run = tmp_path / "hostfile", tmp_path / "run"
    hosts.write_text("".join(f"{name} slots=1\n" for name in nodes.names))
    env = ENVIRONMENT | {"RUN": str(run)}
    nodes.run(nodes.names[0], [ROOT / "launch/deepspeed.sh", hosts, "demo", *SETTINGS, *ZERO], timeout_s=400, env=env)
    two = Result.read(run)
    assert two.world_sizes == [RANKS]
    assert two.differences(one) == []


def test_a_job_on_two_nodes(slurm: Slurm, one: Result, tmp_path: Path) -> None:
    script, two_nodes = ROOT / "launch/slurm/deepspeed.sbatch", ["--nodes=2", "--gpus-per-node=1"]
    words = [*two_nodes, f"--chdir={tmp_path}", script, "demo", *SETTINGS, *ZERO]
    job = slurm.wait(slurm.submit(*words, env=ENVIRONMENT))
    assert (job.state, job.exit_status) == ("COMPLETED", 0), job.output
    two = Result.read(tmp_path / f"runs/demo/{job.number}")
    assert two.world_sizes == [RANKS]
    assert two.differences(one) == []
