"""What a run says: messages to the terminal and to the run's log, metrics to a file, progress where someone looks.

One process speaks: rank 0. A terminal gets rich's progress bar, a pipe gets plain lines.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snell_dist import dist
from snell_dist.config import UserError, trouble
from snell_dist.files import write_atomic

if TYPE_CHECKING:
    from rich.console import Console

    from snell_dist.observers import Moment

LOGGER = logging.getLogger("snell_dist")
FILE, OTHERS = "train.log", "logs"


def set_up() -> None:
    """Sends messages of rank 0 to the terminal; other ranks only warn, and say who they are."""
    LOGGER.handlers.clear()
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO if dist.rank() == 0 else logging.WARNING)
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        LOGGER.addHandler(RichHandler(console=_console(), show_level=False, show_path=False))
    else:
        LOGGER.addHandler(logging.StreamHandler())
    if dist.rank():
        who = logging.Formatter(f"[rank {dist.rank()} on {dist.host()}] %(message)s")
        for handler in LOGGER.handlers:
            handler.setFormatter(who)


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is said where something is lost by it; the terminal has the message."""

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def files(folder: Path) -> list[Path]:
    """Of a run folder, rank 0's first; other ranks have one where they said something."""
    return [file for file in (folder / FILE, *sorted((folder / OTHERS).glob("rank_*.log"))) if file.exists()]


@contextmanager
def also_to(folder: Path) -> Iterator[None]:
    """Messages go to a file of the run folder as well, and so does the traceback of what ends a rank."""
    file = folder / FILE if dist.rank() == 0 else folder / OTHERS / f"rank_{dist.rank():05d}.log"
    file.parent.mkdir(exist_ok=True)
    handler = _File(file, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter(f"%(asctime)s [rank {dist.rank()}] %(message)s"))
    LOGGER.addHandler(handler)
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else traceback.format_exc().rstrip()
        handler.handle(LOGGER.makeRecord(LOGGER.name, logging.ERROR, "", 0, text, (), None))  # not to the terminal
        raise
    finally:
        LOGGER.removeHandler(handler)
        handler.close()


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines in which every column is as wide as its widest entry."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = [str.rjust if i in right else str.ljust for i in range(len(widths))]
    padded = ([side(row[i], widths[i]) for i, side in enumerate(sides)] for row in rows)
    return ["  ".join(row).rstrip() for row in padded]


def info(message: str) -> None:
    LOGGER.info(message)


def warn(message: str) -> None:
    LOGGER.warning(message)


@functools.cache
def _console() -> Console:
    """One for messages and the progress bar, so that neither writes into the other.

    It is standard error: standard output belongs to what a command was asked for.
    """
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class MetricsFile:
    """Observer: one JSON line a record in metrics.jsonl. Lines of steps that a resumed run repeats are dropped."""

    def __init__(self, file: Path, start: int) -> None:
        if file.exists():
            kept = [line for line in file.read_text().splitlines() if _step_of(line) < start]
            write_atomic(file, "".join(f"{line}\n" for line in kept))
        self._stream = file.open("a", buffering=1)

    def on_step(self, moment: Moment) -> None:
        if moment.metrics:
            try:
                self._stream.write(json.dumps({"step": moment.step, **moment.metrics}) + "\n")
            except OSError as error:
                raise trouble(f"{self._stream.name}: cannot be written", error) from None

    def on_end(self, summary: dict[str, Any]) -> None:
        with suppress(OSError):  # of a full disk, which was said
            self._stream.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a crash cut off
        return float("inf")


class Progress:
    """Observer: rate, time left, loss and memory; a bar on a terminal, plain lines in a pipe."""

    def __init__(self, start: int, steps: int) -> None:
        self._steps, self._start, self._begin = steps, start, time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            self._bar = Bar(*columns, console=_console(), transient=True)
            self._task = self._bar.add_task("", total=steps, completed=start)
            self._bar.start()

    def on_step(self, moment: Moment) -> None:
        done, said = moment.step + 1, moment.metrics
        rate = (done - self._start) / (time.perf_counter() - self._begin)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        parts = [f"{_LABELS[key][0]} {said[key]:{_LABELS[key][1]}}" for key in _LABELS if key in said]
        if not parts:
            return
        line = "  ".join([*parts, f"{rate:.1f} steps/s"])
        if self._bar is not None:
            self._bar.update(self._task, description=line)
        else:
            left = (self._steps - done) / rate
            info(f"step {done}/{self._steps}  {line}  {left:.0f} s left")

    def on_end(self, summary: dict[str, Any]) -> None:
        if self._bar is not None:
            self._bar.stop()


_LABELS = {
    "loss": ("loss", ".4f"),
    "val_accuracy": ("val accuracy", ".4f"),
    "lr": ("lr", ".1e"),
    "grad_norm": ("grad norm", ".2f"),
    "process_mib": ("MiB", ".0f"),
}
