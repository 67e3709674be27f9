"""A fault that does nothing would let a drill pass."""

from __future__ import annotations

import subprocess
from pathlib import Path

import conftest
import faults
import pytest
from nodes import Nodes

from snell_dist.checkpoint import newest

pytestmark = pytest.mark.xdist_group("cluster")


def test_a_disk_of_its_own_can_be_full_and_freed(nodes: Nodes, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    write = ["dd", "if=/dev/zero", f"of={disk}/more", "bs=1M", "count=1", "status=none"]
    with faults.small_disk(nodes, disk, mib=4) as outside:
        file = faults.fill(outside)
        for name in nodes.names:
            with pytest.raises(subprocess.CalledProcessError, match="No space left on device"):
                nodes.run(name, write)
        file.unlink()
        for name in nodes.names:
            nodes.run(name, write)
    assert nodes.run(nodes.names[0], ["ls", disk]) == ""
    assert list(disk.iterdir()) == []


def test_a_turned_bit_is_in_the_newest_checkpoint(tmp_path: Path) -> None:
    assert faults.corrupt(tmp_path) is None
    run = conftest.train(tmp_path, "method.rank=4").folder
    assert run is not None
    before = newest(run)
    file = faults.corrupt(run)
    assert before is not None and file is not None
    assert file.parent == before.path
    assert "other contents" in (before.damage(contents=True) or "")
