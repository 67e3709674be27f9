"""The same line typed on two machines comes to what one process comes to, also where one of them loses its torchrun."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import faults
import pytest
from conftest import ROOT
from nodes import Nodes
from training import ENVIRONMENT, RANKS, SETTINGS, Result, alone, steps

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(900)]
START_S = 300
MANY = "train.steps=60"


def typed(nodes: Nodes, run: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    env = ENVIRONMENT | {"NODES": " ".join(nodes.names), "RUN": str(run)}
    words = [ROOT / "launch/torchrun.sh", "demo", *SETTINGS, *overrides]
    return [
        subprocess.Popen(
            nodes.command(name, words), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name in nodes.names
    ]


def ended_well(processes: list[subprocess.Popen[str]]) -> None:
    said = [process.communicate(timeout=START_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS, said


def test_torchrun_typed_on_both(nodes: Nodes, tmp_path: Path) -> None:
    ended_well(typed(nodes, tmp_path / "run"))
    two, one = Result.read(tmp_path / "run"), alone(tmp_path / "one")
    assert two.world_sizes == [RANKS]
    assert two.differences(one) == []
    assert (two.accuracy, two.loss) == (one.accuracy, pytest.approx(one.loss, rel=1e-6))


def test_a_machine_whose_torchrun_is_killed_comes_back(nodes: Nodes, tmp_path: Path) -> None:
    """The ranks of both save and end, and the other machine's torchrun must not take that for the end of the run."""
    run = tmp_path / "run"
    processes = typed(nodes, run, MANY)
    while steps(run) < 3:
        assert not any(process.poll() for process in processes), [process.communicate()[0] for process in processes]
        time.sleep(0.05)
    faults.kill_agent(nodes, nodes.names[1])  # the rendezvous is on the other
    ended_well(processes)
    two = Result.read(run)
    assert two.world_sizes == [RANKS, RANKS]
    assert two.differences(alone(tmp_path / "one", MANY)) == []
