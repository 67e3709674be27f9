"""The same line typed on two machines comes to what one process comes to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from nodes import Nodes
from training import ENVIRONMENT, RANKS, SETTINGS, Result, alone

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(180)]
START_S = 120


def test_torchrun_typed_on_both(nodes: Nodes, tmp_path: Path) -> None:
    env = ENVIRONMENT | {"NODES": " ".join(nodes.names), "RUN": str(tmp_path / "run")}
    words = [ROOT / "launch/torchrun.sh", "demo", *SETTINGS]
    typed = [
        subprocess.Popen(
            nodes.command(name, words), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name in nodes.names
    ]
    said = [process.communicate(timeout=START_S)[0] for process in typed]
    assert [process.returncode for process in typed] == [0] * RANKS, said
    two, one = Result.read(tmp_path / "run"), alone(tmp_path / "one")
    assert two.world_sizes == [RANKS]
    assert two.differences(one) == []
    assert (two.accuracy, two.loss) == (one.accuracy, pytest.approx(one.loss, rel=1e-6))
