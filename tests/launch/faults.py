"""What goes wrong on clusters, to be done to a run on purpose."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nodes import Nodes
from slurm import Slurm

from snell_dist.checkpoint import finished

AGENTS = "torch.distributed.run", "deepspeed.launcher.launch"
BLOCK = 2**16


@dataclass(frozen=True)
class Process:
    """One of Python's on a node; `pid` as it is outside."""

    node: str
    pid: int
    rank: int | None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def ranks(nodes: Nodes) -> list[Process]:
    """Processes that train, in the order of ranks; without the readers that they have started."""
    found = [p for p in _running(nodes, ("snell_dist", "train")) if p.rank is not None]
    return sorted(found, key=lambda process: process.rank or 0)


def agents(nodes: Nodes) -> list[Process]:
    """What a launcher has on each node, and starts ranks there."""
    return [process for module in AGENTS for process in _running(nodes, (module,))]


def kill_rank(nodes: Nodes, rank: int) -> None:
    next(process for process in ranks(nodes) if process.rank == rank).kill()


def kill_agent(nodes: Nodes, node: str) -> None:
    next(process for process in agents(nodes) if process.node == node).kill()


@contextmanager
def small_disk(nodes: Nodes, folder: Path, mib: int = 40) -> Iterator[Path]:
    """A disk of so many MiB in this folder on all nodes. Yields where the same is outside the nodes."""
    folder.mkdir(exist_ok=True)
    nodes.run(nodes.login, ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "disk", folder])
    try:
        yield nodes.path(folder)
    finally:
        nodes.run(nodes.login, ["umount", "--lazy", folder])


def fill(folder: Path, name: str = "filler") -> Path:
    """Takes all that is free on a small disk by one file; deleting it frees the disk."""
    file = folder / name
    with file.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(BLOCK))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return file


def warn(slurm: Slurm, job: int) -> None:
    """What Slurm sends before the time limit to the script that says --signal=B:USR1@..."""
    slurm.run("scancel", "--signal=USR1", "--batch", str(job))


def requeue(slurm: Slurm, job: int) -> None:
    slurm.run("scontrol", "requeue", str(job))


def corrupt(run: Path) -> Path | None:
    """Turns a bit in the newest checkpoint of a run folder; its file, None where there is no checkpoint."""
    found = finished(run)
    if not found:
        return None
    file = next(iter(sorted(found[-1].path.glob("*.distcp"))))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return file


def _running(nodes: Nodes, module: tuple[str, ...]) -> list[Process]:
    """`python -m MODULE ...` on all nodes, but not its forks."""
    found: dict[int, Process] = {}
    parents = {}
    for name in nodes.names:
        for pid in nodes.processes(name):
            with suppress(OSError):  # it ends while we look
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[1:]
                if tuple(word for word in words if word != "-u")[: 1 + len(module)] != ("-m", *module):
                    continue
                variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
                rank = next((int(v.removeprefix("RANK=")) for v in variables if v.startswith("RANK=")), None)
                parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                found[pid] = Process(name, pid, rank)
    return [process for pid, process in found.items() if parents[pid] not in found]
