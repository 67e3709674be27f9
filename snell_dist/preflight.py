"""Before training, in a second: are all ranks here, and are they the same?

Ranks compare notes through the launcher's store, before any collective operation, so that what would be a hang or a
wrong result is a line that names the host. Then one small all-reduce is checked and timed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from snell_dist import dist, log, meeting
from snell_dist.config import PACKAGE, MachineError, UserError
from snell_dist.run_config import Run
from snell_dist.run_folder import installed

if TYPE_CHECKING:
    from torch.distributed import Store

PACKAGES = "torch", "timm", "numpy", "open_clip_torch", "deepspeed"
LEAST_DISK, LEAST_SHM = 16 << 20, 64 << 20  # bytes free
MOST_SKEW_S = 2.0  # of clocks: beyond it logs of two hosts cannot be read together
ELEMENTS = 1 << 18  # of the all-reduce, float32: 1 MiB
MIB = 1 << 20


@dataclass(frozen=True)
class Notes:
    """What a rank says of itself. Sizes in bytes."""

    rank: int
    host: str
    gpu: str  # its unique name; "" on the CPU
    gpus: int  # that the process sees
    python: str
    versions: dict[str, str]
    code: str  # hashes
    config: str
    disk: str
    disk_free: int
    shm_free: int | None  # None: not needed, or none there

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Preflight:
    """`meet` before the group is made, `shake_hands` in it. UserError or MachineError with all causes on every rank."""

    def __init__(self, config: Run, place: Path, device: torch.device) -> None:
        self._config, self._place, self._device = config, place, device
        self._said = ""

    def meet(self, store: Store) -> None:
        begin = time.perf_counter()
        mine = notes(self._config, self._place, self._device)
        name = "preflight"
        store.set(f"{name} notes {mine.rank}", json.dumps(asdict(mine)))
        if dist.rank() == 0:
            everyone, missing = _collect(store, name)
            problems = absent(missing, everyone) or judge(everyone)
            store.set(f"{name} verdict", json.dumps([[str(p), isinstance(p, MachineError)] for p in problems]))
            hosts = len({n.host for n in everyone})
            self._said = (
                f"{len(everyone)} ranks on {hosts} host{'s' * (hosts > 1)} agree on versions, code and settings"
            )
        store.wait([f"{name} verdict"], timedelta(seconds=meeting.MEET_S + 30))
        now = time.time()  # when all have just been let go, at the same moment
        found = json.loads(store.get(f"{name} verdict"))
        store.add(f"{name} heard", 1)
        if found:
            _wait_until_heard(store, name)
            kind = MachineError if all(machine for _, machine in found) else UserError
            raise kind("\n".join(text for text, _ in found))
        self._warn_of_skew(store, name, now)
        self._said += f" ({time.perf_counter() - begin:.2f} s)"

    def _warn_of_skew(self, store: Store, name: str, now: float) -> None:
        if dist.rank() == 0:
            store.set(f"{name} clock", str(now))
        elif dist.rank() % dist.local_world_size() == 0:  # one of each host
            skew = now - float(store.get(f"{name} clock"))
            if abs(skew) > MOST_SKEW_S:
                behind = "ahead of" if skew > 0 else "behind"
                log.warn(f"the clock of {dist.host()} is {abs(skew):.1f} s {behind} rank 0's: its logs will mislead")

    def shake_hands(self) -> None:
        """One small all-reduce, with a result that is known."""
        if dist.world_size() == 1:
            return
        wanted = dist.world_size() * (dist.world_size() - 1) / 2
        seconds = []
        for _ in range(2):  # the first makes the connections
            box = torch.full((ELEMENTS,), float(dist.rank()), device=self._device)
            begin = time.perf_counter()
            right = bool((dist.sum_over_ranks(box) == wanted).all())
            seconds.append(time.perf_counter() - begin)
            if not right:
                raise MachineError(f"{dist.host()}: rank {dist.rank()} got a wrong sum over all ranks: broken network?")
        through = os.environ.get("NCCL_SOCKET_IFNAME" if self._device.type == "cuda" else "GLOO_SOCKET_IFNAME")
        over = f" over {through}" if through else ""
        log.info(f"preflight: {self._said}; 1 MiB all-reduce{over} in {1e3 * seconds[1]:.1f} ms")


def _wait_until_heard(store: Store, name: str) -> None:
    """The store ends with rank 0: it stays until all know why."""
    end = time.monotonic() + 5
    while dist.rank() == 0 and store.add(f"{name} heard", 0) < dist.world_size() and time.monotonic() < end:
        time.sleep(0.01)


def notes(config: Run, place: Path, device: torch.device) -> Notes:
    """This rank's. `place`: a folder that is, or will be, on the file system of the run."""
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    shm = Path("/dev/shm")
    reads = config.data.reading_processes() > 0
    cuda = device.type == "cuda"
    return Notes(
        rank=dist.rank(),
        host=dist.host(),
        gpu=str(torch.cuda.get_device_properties(device).uuid) if cuda else "",
        gpus=torch.cuda.device_count() if cuda else 0,
        python=".".join(map(str, sys.version_info[:3])),
        versions={name: found for name in PACKAGES if (found := installed(name))},
        code=code_hash(),
        config=hashlib.sha256(json.dumps(config.model_dump(), sort_keys=True, default=str).encode()).hexdigest(),
        disk=str(there),
        disk_free=shutil.disk_usage(there).free,
        shm_free=shutil.disk_usage(shm).free if reads and shm.is_dir() else None,
    )


def code_hash() -> str:
    """Of this package's Python files."""
    found = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        found.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


def _collect(store: Store, name: str) -> tuple[list[Notes], list[int]]:
    """The notes that come in time, and the ranks whose do not."""
    end, found, missing = time.monotonic() + meeting.MEET_S, [], []
    for rank in range(dist.world_size()):
        key = f"{name} notes {rank}"
        try:
            store.wait([key], timedelta(seconds=max(0.05, end - time.monotonic())))
        except RuntimeError:
            missing.append(rank)
        else:
            found.append(Notes(**json.loads(store.get(key))))
    return found, missing


def absent(missing: list[int], there: list[Notes]) -> list[UserError]:
    if not missing:
        return []
    hosts = ", ".join(dict.fromkeys(n.host for n in there))
    ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    said = f"rank {ranks} did not come within {meeting.MEET_S} s, {len(there)} of {dist.world_size()} are here"
    return [MachineError(f"preflight: {said} (on {hosts}): see whether the other nodes' processes started")]


def judge(everyone: list[Notes]) -> list[UserError]:
    """What must not be, each once, with the host that it is on; the first rank is the measure."""
    first = everyone[0]
    found: list[UserError] = []
    compared: list[tuple[str, Callable[[Notes], Any], str]] = [
        ("Python", lambda n: n.python, "use one environment on all nodes"),
        *((package, lambda n, p=package: n.versions.get(p), "install the same on all nodes") for package in PACKAGES),
        ("snell_dist's code", lambda n: n.code[:12], "one checkout on a shared file system, or the same commit"),
        ("the configuration", lambda n: n.config[:12], "the same file and the same key=value on all nodes"),
    ]
    for what, of, mend in compared:
        other = next((n for n in everyone if of(n) != of(first)), None)
        if other is not None:
            said = f"{what} is {of(other)} for {other.name} and {of(first)} for {first.name}"
            found.append(UserError(f"preflight: {said}: {mend}"))
    owner: dict[tuple[str, str], Notes] = {}
    for n in everyone:
        before = owner.setdefault((n.host, n.gpu), n)
        if n.gpu and before is not n:
            ranks = sum(m.host == n.host for m in everyone)
            said = (
                f"rank {before.rank} and rank {n.rank} share a GPU on {n.host}: {ranks} ranks and {n.gpus} GPUs there"
            )
            found.append(
                UserError(f"preflight: {said}; start {n.gpus} processes a node, or look at CUDA_VISIBLE_DEVICES")
            )
            break
    for n in _one_a_host(everyone):
        if n.disk_free < LEAST_DISK:
            said = f"{n.host}: {n.disk} has {n.disk_free / MIB:.0f} MiB free, checkpoints need {LEAST_DISK / MIB:.0f}"
            found.append(MachineError(f"preflight: {said}: free some, or --out on another disk"))
        if n.shm_free is not None and n.shm_free < LEAST_SHM:
            said = f"{n.host}: /dev/shm has {n.shm_free / MIB:.0f} MiB free, and data workers pass images through it"
            found.append(MachineError(f"preflight: {said}: --shm-size=8g in a container, or data.workers=0"))
    return found


def _one_a_host(everyone: list[Notes]) -> Iterable[Notes]:
    return {n.host: n for n in reversed(everyone)}.values()
