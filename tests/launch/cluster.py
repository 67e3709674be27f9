"""One cluster for all tests of a session; they run in one process (`xdist_group("cluster")`), one after another.

Where a machine cannot have one, tests skip with the reason; in CI, which must have one, they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence

import nodes as node_tools
import pytest
import slurm as slurm_tools
import ssh as ssh_tools
from nodes import Nodes
from slurm import Slurm
from ssh import Ssh


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two machines and a login node. A test gives back what it has cut."""
    _need(node_tools.TOOLS)
    with Nodes(2, tmp_path_factory.mktemp("nodes")) as up:
        yield up


@pytest.fixture(scope="session")
def slurm(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Slurm:
    _need(slurm_tools.TOOLS)
    return Slurm(nodes, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="session")
def ssh(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Ssh:
    _need(ssh_tools.TOOLS)
    return Ssh(nodes, tmp_path_factory.mktemp("ssh"))


def _need(tools: Sequence[str]) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if os.geteuid() == 0 and not missing:
        return
    reason = f"a cluster on this machine needs {', '.join(missing) or 'root'}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
