"""The cluster is one: names, links and Slurm do what those of real machines do, and nothing of it is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nodes import SWITCH, Nodes
from slurm import Slurm
from ssh import Ssh

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(300)]
HERE = Path(__file__).parent
# Status 1 where the node of this name takes no connection within a second.
REACH = "import socket, sys; socket.create_connection((sys.argv[1], 5000), timeout=1)"
ANSWER = "import socket; s = socket.create_server(('', 5000)); print('up', flush=True)\nwhile True: s.accept()"


def reaches(nodes: Nodes, one: str, other: str) -> bool:
    return subprocess.run(nodes.command(one, [sys.executable, "-c", REACH, other]), capture_output=True).returncode == 0


def test_nodes_have_names_and_reach_each_other_until_a_link_is_cut(nodes: Nodes) -> None:
    one, two = nodes.names
    assert [nodes.run(name, ["hostname"]).strip() for name in nodes.names] == nodes.names
    assert nodes.run(two, ["hostname", "-I"]).split() == [nodes.addresses[two]]
    with subprocess.Popen(nodes.command(two, [sys.executable, "-c", ANSWER]), stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        assert reaches(nodes, one, two) and reaches(nodes, nodes.login, two)
        nodes.cut(two)
        assert not reaches(nodes, one, two)
        nodes.mend(two)
        assert reaches(nodes, one, two)
        assert nodes.kill(two) >= 1
        assert server.wait(10) != 0
    assert nodes.processes(two) == []
    assert not reaches(nodes, one, two)


def test_slurm_runs_a_job_on_two_nodes_with_gpus_and_starts_it_again(slurm: Slurm, tmp_path: Path) -> None:
    said = ["--nodes=2", "--gpus-per-node=a100:2", "--cpus-per-task=8", f"--output={tmp_path}/%j.out"]
    first = slurm.wait(slurm.submit(*said, "--wrap", "srun hostname; echo $SLURM_GPUS_PER_NODE"))
    assert (first.state, sorted(first.output.split())) == ("COMPLETED", ["a100:2", *slurm.nodes.names])
    again = slurm.submit(*said, "--open-mode=append", "--requeue", "--wrap", "echo begins; sleep 1; exit 3")
    slurm.wait(again, "RUNNING")
    slurm.run("scontrol", "requeue", str(again))
    ended = slurm.wait(again, restarts=1)
    assert (ended.state, ended.exit_status, ended.output.count("begins")) == ("FAILED", 3, 2)


def test_a_crashed_node_can_come_back(slurm: Slurm, tmp_path: Path) -> None:
    *_, last = slurm.nodes.names
    slurm.nodes.crash(last)
    slurm.nodes.boot(last)
    slurm.start(last)
    slurm.wait_for_nodes("idle", last)
    assert slurm.wait(slurm.submit("--nodes=2", f"--output={tmp_path}/%j.out", "--wrap", "srun true")).exit_status == 0


def test_ssh_and_pdsh_reach_every_node_without_a_question(nodes: Nodes, ssh: Ssh) -> None:
    one, two = nodes.names
    assert nodes.run(one, ["ssh", two, "hostname"]).strip() == two
    many = ["env", "PDSH_RCMD_TYPE=ssh", "pdsh", "-S", "-w", ",".join(nodes.names), "hostname"]
    assert sorted(nodes.run(nodes.login, many).splitlines()) == [f"{name}: {name}" for name in nodes.names]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_when_the_tests_are_ended(end: signal.Signals, nodes: Nodes, tmp_path: Path) -> None:
    """Beside the cluster of this session, with the same names."""
    script = (
        f"import signal, sys, time; sys.path.insert(0, {str(HERE)!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which who starts tests may have had ignored
        "from pathlib import Path; from nodes import Nodes; from slurm import Slurm\n"
        "folder = Path(sys.argv[1]); (folder / 'slurm').mkdir()\n"
        "with Nodes(2, folder) as nodes:\n"
        "    Slurm(nodes, folder / 'slurm'); print('up', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"up\n"
        assert len(naming(tmp_path)) >= 4  # munged, slurmctld and two slurmd
        other.send_signal(end)
        assert other.wait(60) != 0
    deadline = time.monotonic() + 10
    while (left := naming(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert nodes.login not in Path("/etc/hosts").read_text()
    assert not set(os.listdir("/sys/class/net")) & {*nodes.addresses, SWITCH}


def naming(folder: Path) -> list[int]:
    """Processes that have this folder in their command or environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            said = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in said:
            found.append(int(pid))
    return found
