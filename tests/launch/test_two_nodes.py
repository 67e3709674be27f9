"""torchrun on two machines comes to what one process comes to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from nodes import Nodes
from training import ENVIRONMENT, RANKS, Result, alone, train

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(180)]
START_S = 120


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return alone(tmp_path_factory.mktemp("one"))


def everywhere(nodes: Nodes, words: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """The same command typed on every node."""
    started = [
        subprocess.Popen(
            nodes.command(name, words), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name in nodes.names
    ]
    said = [process.communicate(timeout=START_S)[0] for process in started]
    return [subprocess.CompletedProcess(p.args, p.returncode, o) for p, o in zip(started, said, strict=True)]


def test_torchrun_typed_on_both(nodes: Nodes, one: Result, tmp_path: Path) -> None:
    meet = f"--rdzv-endpoint={nodes.names[0]}:29400"
    torchrun = ["torchrun", f"--nnodes={RANKS}", "--nproc-per-node=1", "--rdzv-backend=c10d", meet, "-m"]
    for done in everywhere(nodes, [*torchrun, *train(tmp_path / "run")]):
        assert done.returncode == 0, done.stdout
    two = Result.read(tmp_path / "run")
    assert two.world_sizes == [RANKS]
    assert two.differences(one) == []
    assert (two.accuracy, two.loss) == (one.accuracy, pytest.approx(one.loss, rel=1e-6))
