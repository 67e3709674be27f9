"""Limits on this process's memory, and who has been ended by them: `ulimit -v`, and control groups (versions 1, 2)."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60  # what version 1 says instead
SAYS = re.compile(r"out of memory|can't allocate memory|not enough memory|bad_alloc", re.IGNORECASE)


def ran_out(error: BaseException) -> bool:
    """Whether it means that memory ran out: torch's on any device, Python's and numpy's, and the system's own."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and SAYS.search(str(error)) is not None)


def limits() -> dict[str, int]:
    """Bytes by what limits them; empty where nothing does."""
    found = {}
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        found["ulimit -v"] = soft
    for folder in _groups():
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max"
                size = int((folder / name).read_text())
                if size < UNLIMITED:
                    found.setdefault("the control group", size)
    return found


def in_use() -> dict[str, int]:
    """Bytes of this process: resident, and of its address space. Empty where the system does not tell."""
    words = {"VmRSS": "resident", "VmSize": "address space"}
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        said = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
        return {word: int(said[name].split()[0]) * 1024 for name, word in words.items() if name in said}
    return {}


def kills() -> int:
    """How many processes of this control group the kernel has ended for want of memory; 0 where it does not tell."""
    for folder in _groups():
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError, KeyError, ValueError):
                return int(dict(line.split() for line in (folder / name).read_text().splitlines())["oom_kill"])
    return 0


def _groups() -> Iterator[Path]:
    """This process's control groups that may count memory; in a container its own is often seen as the root."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                for root in (GROUPS / controllers / path.lstrip("/"), GROUPS / controllers):
                    if root.is_dir():
                        yield root
