"""What keeps ranks from meeting is one line that names host and cause: judged from notes, and by real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, TINY
from disturbed import torchrun

from snell_dist import dist
from snell_dist.config import MachineError, load
from snell_dist.preflight import MIB, Notes, Preflight, absent, judge, notes
from snell_dist.run_config import Run

ONE = Notes(
    rank=0,
    host="node1",
    gpu="GPU-a",
    gpus=2,
    python="3.11.7",
    versions={"torch": "2.14.1", "timm": "1.0.31"},
    code="c" * 64,
    config="f" * 64,
    disk="/runs",
    disk_free=900 * MIB,
    shm_free=None,
)
ALL = [ONE, replace(ONE, rank=1, gpu="GPU-b"), replace(ONE, rank=2, host="node2", gpu="GPU-c")]


def test_ranks_that_agree_have_no_problem() -> None:
    assert judge(ALL) == absent([], ALL) == []
    assert judge([replace(n, gpu="", gpus=0) for n in ALL]) == [], "on the CPU all share it"


@pytest.mark.parametrize(
    ("change", "said", "machine"),
    [
        ({"python": "3.10.2"}, "Python is 3.10.2 for rank 2 on node2 and 3.11.7 for rank 0 on node1: use one", False),
        (
            {"versions": {"torch": "2.6.0", "timm": "1.0.31"}},
            "torch is 2.6.0 for rank 2 on node2 and 2.14.1 for",
            False,
        ),
        ({"versions": {"torch": "2.14.1"}}, "timm is None for rank 2 on node2 and 1.0.31 for rank 0 on node1", False),
        ({"code": "d" * 64}, "snell_dist's code is dddddddddddd for rank 2 on node2 and cccccccccccc for", False),
        ({"config": "e" * 64}, "the configuration is eeeeeeeeeeee for rank 2 on node2 and ffffffffffff for", False),
        (
            {"host": "node1", "gpu": "GPU-a"},
            "rank 0 and rank 2 share a GPU on node1: 3 ranks and 2 GPUs there; start 2 processes a node",
            False,
        ),
        ({"disk_free": 3 * MIB}, "node2: /runs has 3 MiB free, checkpoints need 16: free some", True),
        ({"shm_free": 8 * MIB}, "node2: /dev/shm has 8 MiB free, and data workers pass images through it", True),
    ],
)
def test_a_cause_names_host_and_mend(change: dict[str, object], said: str, machine: bool) -> None:
    (problem,) = judge([*ALL[:2], replace(ALL[2], **change)])
    assert str(problem).startswith("preflight: " + said)
    assert isinstance(problem, MachineError) == machine


def test_all_causes_are_said_at_once_and_each_once() -> None:
    other = replace(ONE, python="3.10.2", code="d" * 64, gpu="GPU-c", disk_free=0, host="node2")
    said = list(map(str, judge([ONE, replace(other, rank=1), replace(other, rank=2, gpu="GPU-d")])))
    assert [line.split()[1] for line in said] == ["Python", "snell_dist's", "node2:"]


def test_who_did_not_come_is_counted() -> None:
    (problem,) = absent([3, 4], ALL)
    assert str(problem).startswith(
        "preflight: rank 3, 4 did not come within 300 s, 3 of 1 are here (on node1, node2): "
    )
    assert isinstance(problem, MachineError)
    assert "rank 0, 1, 2, 3, 4, 5, 6, 7, ... did" in str(absent(list(range(500)), ALL)[0])


def test_a_rank_knows_itself(tmp_path: Path) -> None:
    config = load("demo", TINY, Run).config
    mine = notes(config, tmp_path / "not" / "yet", torch.device("cpu"))
    assert (mine.rank, mine.gpu, mine.disk) == (0, "", str(tmp_path))
    assert mine.disk_free > 0
    assert judge([mine, replace(mine, rank=1)]) == []
    other = notes(load("demo", [*TINY, "method.rank=4"], Run).config, tmp_path, torch.device("cpu"))
    assert (other.code == mine.code, other.config == mine.config) == (True, False)


@pytest.mark.parametrize(("ahead_s", "said"), [(30.0, "30.0 s ahead of rank 0's"), (-30.0, "30.0 s behind"), (1.0, "")])
def test_a_clock_that_is_off_is_warned_of(ahead_s, said, monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    store = torch.distributed.HashStore()
    check = Preflight(load("demo", TINY, Run).config, Path(), torch.device("cpu"))
    check._warn_of_skew(store, "preflight", 1000.0)
    monkeypatch.setenv("RANK", "1")
    check._warn_of_skew(store, "preflight", 1000.0 + ahead_s)
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


def test_two_configurations_in_one_job_are_named(tmp_path: Path) -> None:
    script = 'exec "$0" -m snell_dist train demo "$@" method.rank=$((4 + 4 * RANK))'
    words = torchrun("--no-python", "bash", "-c", script, sys.executable, *TINY, "--out", str(tmp_path / "runs"))
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("snell: ")]
    assert line.startswith("snell: preflight: the configuration is ")
    assert f"for rank 1 on {dist.host()} and " in line
    assert "the same file and the same key=value on all nodes" in line
    assert "exitcode  : 2 " in done.stderr
    assert not (tmp_path / "runs").exists()


@contextmanager
def listening() -> Iterator[int]:
    with socket.socket() as door:
        door.bind(("", 0))
        door.listen()
        yield door.getsockname()[1]


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("", 0))
        return door.getsockname()[1]


def test_ranks_that_cannot_meet_end_with_one_line(tmp_path: Path) -> None:
    """All at once, since each mostly waits; the two that nobody answers wait 3 s instead of five minutes."""
    hurried = "import sys; from snell_dist import cli, meeting; meeting.MEET_S = 3; sys.exit(cli.main(sys.argv[1:]))"
    train = ["train", "demo", *TINY, "--out", str(tmp_path / "runs")]
    lone = str(free_port())
    local = {"MASTER_ADDR": "127.0.0.1"}
    with listening() as taken:
        cases: list[tuple[dict[str, str], int, str]] = [
            (
                {"RANK": "0", **local, "MASTER_PORT": str(taken)},
                2,
                f"MASTER_ADDR=127.0.0.1 port {taken} is in use on {dist.host()}: end what listens there, or set",
            ),
            (
                {"RANK": "0", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1"},
                74,
                f"{dist.host()}: MASTER_ADDR=no-such-host.invalid: the name is not known there",
            ),
            ({"RANK": "0"}, 2, "launcher: WORLD_SIZE is 2 but MASTER_ADDR and MASTER_PORT do not name the first"),
            (
                {"RANK": "1", **local, "MASTER_PORT": lone},
                74,
                f"[rank 1] {dist.host()}: rank 1 cannot reach MASTER_ADDR=127.0.0.1 port {lone} within 3 s: nothing",
            ),
            ({"RANK": "0", **local, "MASTER_PORT": str(free_port())}, 74, f"{dist.host()}: MASTER_ADDR=127.0.0.1 port"),
        ]
        bare = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")} | {"WORLD_SIZE": "2"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", hurried, *train], env=bare | said, stderr=subprocess.PIPE, text=True
            )
            for said, _, _ in cases
        ]
        for process, (_, status, said) in zip(started, cases, strict=True):
            _, stderr = process.communicate(timeout=240)
            assert process.returncode == status, stderr
            (line,) = stderr.splitlines()
            assert line.startswith(f"snell: {said}")
    assert not (tmp_path / "runs").exists()
