"""What this machine, or the cluster behind it, offers: GPUs, cores, Slurm's partitions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from snell_dist.config import UserError

COUNT = re.compile(r"(?:(?P<kind>[A-Za-z0-9][\w.+-]*):)?(?P<number>\d+)")
TIMES = (  # of Slurm, as its manual names them
    (re.compile(r"(?P<m>\d+)(?::(?P<s>\d+))?"), "minutes[:seconds]"),
    (re.compile(r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)"), "hours:minutes:seconds"),
    (re.compile(r"(?P<d>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?"), "days-hours[:minutes[:seconds]]"),
)
ASK_S = 20  # a controller under load is slow


@dataclass(frozen=True)
class Count:
    """So many GPUs of a node, of a kind where that was said: `a100:4`."""

    number: int
    kind: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}" if self.kind else str(self.number)


@dataclass(frozen=True)
class Partition:
    """`gpus` by kind, of the node that has most of it (None: kinds that were not named); `time_s` None: no limit."""

    name: str
    default: bool
    nodes: int
    cpus: int
    gpus: Mapping[str | None, int]
    time_s: int | None

    def most_gpus(self, kind: str | None) -> int:
        """On one node; of any kind where none is said."""
        return max(self.gpus.values(), default=0) if kind is None else self.gpus.get(kind, 0)


def count(said: str, option: str = "--gpus-per-node") -> Count:
    """`4` or `a100:4`. UserError for anything else."""
    match = COUNT.fullmatch(said)
    if match is None:
        raise UserError(f"{option} {said}: expected N or KIND:N, such as 4 or a100:4")
    return Count(int(match["number"]), match["kind"])


def seconds(said: str) -> int:
    """A time as Slurm writes it. UserError where it would not be read, or is not what one thinks."""
    for form, _ in TIMES:
        match = form.fullmatch(said)
        if match:
            parts = {key: int(value or 0) for key, value in match.groupdict().items()}
            return sum(parts.get(key, 0) * size for key, size in zip("dhms", (86400, 3600, 60, 1), strict=True))
    forms = ", ".join(name for _, name in TIMES)
    raise UserError(f"--time {said}: expected {forms}, such as 90, 04:00:00 or 1-12")


def gpus() -> int:
    """GPUs of this node: as Slurm counts those of the job, else as the driver lists them."""
    said = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if said.isdecimal():
        return int(said)
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = _ask("nvidia-smi", "-L")
    except UserError:  # a driver that does not run has no GPU to offer
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None and shutil.which("sinfo") is not None


def partitions() -> list[Partition]:
    """What Slurm offers, or nothing without Slurm. UserError where its controller does not answer."""
    return read_partitions(_ask("sinfo", "--noheader", "--format=%P|%D|%c|%G|%l")) if has_slurm() else []


def read_partitions(listing: str) -> list[Partition]:
    """From sinfo's lines, of which a partition with unlike nodes has several: name|nodes|cpus|gres|time."""
    found: dict[str, Partition] = {}
    for line in listing.splitlines():
        name, nodes, cpus, gres, time = (word.strip() for word in line.split("|"))
        mine = Partition(name.rstrip("*"), name.endswith("*"), int(nodes), _first(cpus), _gres(gres), _limit(time))
        there = found.get(mine.name)
        if there is not None:
            most = {kind: max(there.gpus.get(kind, 0), mine.gpus.get(kind, 0)) for kind in {**there.gpus, **mine.gpus}}
            mine = Partition(
                mine.name, mine.default, there.nodes + mine.nodes, max(there.cpus, mine.cpus), most, mine.time_s
            )
        found[mine.name] = mine
    return list(found.values())


def _gres(said: str) -> dict[str | None, int]:
    """`gpu:a100:4(S:0-1),gpu:2,nvme:1`; "(null)" where there is nothing."""
    found: dict[str | None, int] = {}
    for word in re.sub(r"\([^)]*\)", "", said).split(","):
        parts = word.split(":")
        if parts[0] == "gpu" and parts[-1].isdecimal():
            kind = parts[1] if len(parts) == 3 else None
            found[kind] = found.get(kind, 0) + int(parts[-1])
    return found


def _limit(said: str) -> int | None:
    return None if said in ("infinite", "n/a") else seconds(said)


def _first(said: str) -> int:
    """`8`, or `8+` where nodes differ."""
    return int(said.rstrip("+"))


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ASK_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: gave no answer within {ASK_S} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"{command[0]}: {reason.removeprefix(f'{command[0]}: ')}")
    return done.stdout
