"""Runs that are disturbed in the midst of their steps: real launchers, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import ENVIRONMENT, ROOT, TINY, command

# Without the store that agents share with their workers, as the launch scripts say it.
AROUND = ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
PATIENCE_S = 240.0  # for what takes seconds: other tests run at the same time


def slowly(folder: Path, *overrides: str) -> list[str]:
    """The words behind `python` for a run in `folder`; a step lasts 0.2 s while RUN.slow exists."""
    words = [ROOT / "tests/slowly.py", slow(folder), "train", "demo", *TINY, "method.rank=4", *overrides]
    return [*map(str, words), "--folder", str(folder), "--resume-if-any"]


def slow(folder: Path) -> Path:
    return folder.with_suffix(".slow")


def torchrun(*words: str, restarts: int = 0) -> list[str]:
    """Two processes on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = [f"--max-restarts={restarts}", f"--signals-to-handle={SIGNALS}", "--shutdown-timeout=5"]
    return [*launcher, *options, *words]


def keeps(folder: Path, launched: Sequence[str], *options: str) -> list[str]:
    return [*command("keep", folder, "--grace", "60", "--pause", "0.2", *options), "--", *launched]


@contextmanager
def started(log: Path, words: Sequence[str], **environment: str) -> Iterator[subprocess.Popen]:
    """A process group of its own; what it says goes to `log`. Nothing of it outlives the block."""
    with log.open("a") as stream:
        process = subprocess.Popen(
            words, stdout=stream, stderr=stream, env=AROUND | environment, start_new_session=True
        )
        try:
            yield process
        finally:
            for pid in [process.pid, *family(process.pid)]:
                _kill(pid)
            process.wait()


def until(true: Callable[[], object], what: str, within_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.05)


def pid_of(folder: Path, rank: int) -> int:
    return json.loads((folder / f"heartbeat/rank_{rank:05d}.json").read_text())["pid"]


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def family(pid: int) -> list[int]:
    """Everything that it started, and they."""
    return [each for child in children(pid) for each in (child, *family(child))]


def lives(pid: int) -> bool:
    """And is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
