"""A throw-away Slurm on the nodes: controller and munge on the login node, one slurmd a node. Debian's packages do.

Nodes say that they have 16 cores and two GPUs of type a100, which nobody looks for, so that scripts made for real
machines are accepted. Times are short: a dead node is noticed within half a minute, a requeued job starts again after
six seconds.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nodes import Nodes

TOOLS = "slurmctld", "slurmd", "sbatch", "munged"
DEAD_S = 20
START_S, STATE_S, POLL_S = 60, 300, 0.1
# cred_expire is also how long a requeued job waits, 120 s by default. Without cgroups mounted slurmd wants to be told
# of them all the same.
CONF = """\
ClusterName=snell
SlurmctldHost={login}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout={dead_s}
InactiveLimit=0
KillWait=15
JobRequeue=1
MinJobAge=3600
NodeName={names} CPUs=16 RealMemory=64000 Gres=gpu:a100:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
CGROUP = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"
GPUS = 2
GRES = "Name=gpu Type=a100 File={folder}/gpu[0-1]\n"
ENDED = "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"


class Slurm:
    """Commands on the login node of a running Slurm; it ends when the nodes do. OSError where it does not start.

    dead_s: a node that is silent for so long is down.
    """

    def __init__(self, nodes: Nodes, folder: Path, dead_s: int = DEAD_S) -> None:
        self.nodes, self.folder = nodes, folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", *(f"spool-{node}" for node in nodes.names)):
            (folder / name).mkdir()
        names = ",".join(nodes.names)
        (folder / "slurm.conf").write_text(CONF.format(login=nodes.login, folder=folder, names=names, dead_s=dead_s))
        (folder / "cgroup.conf").write_text(CGROUP)
        (folder / "gres.conf").write_text(GRES.format(folder=folder))
        for n in range(GPUS):
            (folder / f"gpu{n}").touch()  # Slurm counts devices by their files
        self._munge()
        self.run("slurmctld")
        for name in nodes.names:
            self.start(name)
        self.wait_for_nodes("idle")

    def start(self, node: str) -> None:
        """slurmd, at first and after a crash."""
        self.run("slurmd", node=node)

    def run(
        self, *words: str | Path, node: str | None = None, env: Mapping[str, str] = os.environ, timeout_s: float = 60
    ) -> str:
        """What a command prints that knows this Slurm, on the login node or another."""
        return self.nodes.run(node or self.nodes.login, words, timeout_s, {**env, **self.environment})

    def submit(self, *words: str | Path, env: Mapping[str, str] = os.environ) -> int:
        """`sbatch` of these words; the job's number."""
        return int(self.run("sbatch", "--parsable", *words, env=env))

    def job(self, number: int) -> Job:
        return Job.read(self.run("scontrol", "--oneliner", "show", "job", str(number)))

    def wait(self, number: int, *states: str, restarts: int = 0, timeout_s: float = STATE_S) -> Job:
        """The job once it is in one of these states (default: ended), after so many restarts at least. TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while True:
            job = self.job(number)
            if job.state in (states or ENDED) and job.restarts >= restarts:
                return job
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is {job.state} after {timeout_s} s: {job.output}")
            time.sleep(POLL_S)

    def wait_for_nodes(self, state: str, *names: str, timeout_s: float = START_S) -> None:
        """Until these nodes (default: all) are in a state as `sinfo` prints it. TimeoutError."""
        chosen = ",".join(names or self.nodes.names)
        deadline = time.monotonic() + timeout_s
        while set(found := self.run("sinfo", "--noheader", "--Node", "--format=%T", f"--nodes={chosen}").split()) != {
            state
        }:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{chosen}: {found} instead of {state} after {timeout_s} s")
            time.sleep(POLL_S)

    def _munge(self) -> None:
        """One daemon with a key of its own serves all nodes, since they share the file system."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = (f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "log", "pid", "seed"))
        self.run("munged", "--force", f"--socket={self.folder}/munge.socket", *files)


@dataclass(frozen=True)
class Job:
    """What Slurm says of a job."""

    number: int
    state: str
    exit_status: int
    restarts: int
    submitted: float  # Unix time, in whole seconds
    started: float | None
    out: Path

    @classmethod
    def read(cls, line: str) -> Job:
        """A line of `scontrol --oneliner show job`."""
        said = dict(re.findall(r"(\S+?)=(\S*)", line))
        status, signal = map(int, said["ExitCode"].split(":"))
        return cls(
            number=int(said["JobId"]),
            state=said["JobState"],
            exit_status=128 + signal if signal else status,
            restarts=int(said["Restarts"]),
            submitted=_time(said["SubmitTime"]) or 0,
            started=_time(said["StartTime"]),
            out=Path(said["StdOut"]),
        )

    @property
    def output(self) -> str:
        """What it has written up to now, standard error included where it has no file of its own."""
        return self.out.read_text() if self.out.exists() else ""


def _time(text: str) -> float | None:
    return None if text == "Unknown" else time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
