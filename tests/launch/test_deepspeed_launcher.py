"""DeepSpeed's launcher, over real pdsh and sshd, comes to what one process comes to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from nodes import Nodes
from ssh import Ssh
from training import ENVIRONMENT, RANKS, Result, alone, train

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(600)]
# The first process that uses DeepSpeed without a GPU compiles this, silently and for minutes where others compute.
WARM = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)"
ZERO = ["engine.name=zero", "engine.stage=3"]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    subprocess.run([sys.executable, "-c", WARM], env=ENVIRONMENT, check=True, timeout=500, capture_output=True)


def test_deepspeed_typed_on_one(nodes: Nodes, ssh: Ssh, tmp_path: Path) -> None:
    hosts, first = tmp_path / "hostfile", nodes.names[0]
    hosts.write_text("".join(f"{name} slots=1\n" for name in nodes.names))
    carried = tmp_path / "carried"
    carried.write_text("OMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hosts, "--master_addr", first]
    words = [*launcher, "--no_local_rank", "--module", *train(tmp_path / "run", *ZERO)]
    nodes.run(first, words, timeout_s=120, env={**ENVIRONMENT, "DS_ENV_FILE": str(carried)})
    two = Result.read(tmp_path / "run")
    assert two.world_sizes == [RANKS]
    assert two.differences(alone(tmp_path / "one")) == []
