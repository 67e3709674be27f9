"""Where each rank is, in files that others can read while it works, and while it is stuck.

RUN/heartbeat/rank_00003.json is written every second by a thread of that rank: its step, its phase, how long it has
been there and, where that is long, in which function. The loop only calls `enter("data")`, which costs a microsecond.
The same thread ends a rank that has been in one phase for too long, with a sentence that says who waits for whom.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from snell_dist import dist
from snell_dist.config import PACKAGE

FOLDER = "heartbeat"
PHASES = {  # in the order of a step, as people call them
    "start": "the start",
    "data": "the dataloader",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "update": "the optimizer's update",
    "agree": "the agreement to go on",
    "log": "logging",
    "evaluate": "evaluation",
    "save": "saving a checkpoint",
    "end": "the end",
}
KEPT_BY = "SNELL_KEPT_BY"  # a variable of a rank's environment
PERIOD_S = 1.0  # between two beats of a rank; longer where many ranks share a file system
RANKS_A_SECOND = 64
LONG_S = 2.0  # in one phase: worth a look at the stack
BYTES = 1024  # a beat; one write, so that a reader sees the old one or the new one


@dataclass(frozen=True)
class Beat:
    """What a rank said of itself last. `silent_s`: how much longer ago than the newest beat of all ranks."""

    rank: int
    world_size: int
    host: str
    pid: int
    attempt: int
    step: int  # from 1, the one at work
    steps: int
    phase: str
    phase_s: float
    doing: str = ""  # function, file and line, where the phase is long
    waits_in: str = ""  # the collective operation that it has not come out of
    ended: str = ""  # how, where it has
    kept_by: str = ""  # who starts it again, as `snell keep` says
    pid_space: str = ""  # in which `pid` means something: a machine's, or a container's
    seconds: dict[str, float] = field(default_factory=dict)  # by phase, since the second step began
    timed_steps: int = 0  # in which those seconds were spent, the last one still at work
    silent_s: float = 0.0
    age_s: float = 0.0  # since it was written

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def lives(self, within_s: float) -> bool:
        """Whether the rank has neither ended nor been silent for so long, and its process is not known to be gone."""
        return not self.ended and self.age_s < within_s and self.is_there()

    def is_there(self) -> bool:
        """Whether the process is, where that can be seen; of another machine or container its heartbeat is all."""
        if not self.pid_space or self.pid_space != pid_space():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True


def pid_space() -> str:
    """Names this process's namespace of process numbers; "" where there are none."""
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def read(folder: Path) -> list[Beat]:
    """The newest attempt's beats by rank; none where no run has beaten there."""
    found, times = [], []
    now = time.time()
    for file in sorted((folder / FOLDER).glob("rank_*.json")):
        try:
            said = json.loads(file.read_text())
            times.append(file.stat().st_mtime)
            found.append(said)
        except (OSError, ValueError):  # gone, or of a machine that died while writing
            continue
    newest = max((said["attempt"] for said in found), default=0)
    latest = max(times, default=now)
    return [
        Beat(**said, silent_s=latest - at, age_s=now - at)
        for said, at in zip(found, times, strict=True)
        if said["attempt"] == newest
    ]


class Heart:
    """Beats for this rank until `stop`. Its thread calls `on_stuck` where a phase takes longer than `limit_s`."""

    def __init__(
        self, folder: Path, attempt: int, steps: int, limit_s: float, on_stuck: Callable[[Path, float], None]
    ) -> None:
        self._folder, self._attempt, self._steps = folder, attempt, steps
        self._limit_s, self._on_stuck = limit_s, on_stuck
        self._phase, self._since, self._step, self._first = "start", time.perf_counter(), 0, 0
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._ended = ""
        self._main = threading.get_ident()
        self._period_s = max(PERIOD_S, dist.world_size() / RANKS_A_SECOND)
        (folder / FOLDER).mkdir(exist_ok=True)
        self._file = os.open(folder / FOLDER / f"rank_{dist.rank():05d}.json", os.O_WRONLY | os.O_CREAT, 0o644)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._write()
        self._thread.start()

    def enter(self, phase: str, step: int | None = None) -> None:
        now = time.perf_counter()
        self._seconds[self._phase] += now - self._since
        if step is not None:
            self._first = self._first or step
            if step <= self._first + 1:  # the first one warms up and is not counted
                self._seconds = dict.fromkeys(PHASES, 0.0)
            self._step = step
        self._phase, self._since = phase, now

    @property
    def place(self) -> tuple[str, int]:
        return self._phase, self._step

    def stop(self, ended: str) -> None:
        self._ended = ended
        self._stop.set()
        self._thread.join(timeout=10)
        self._write()
        os.close(self._file)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            stuck_s = time.perf_counter() - self._since
            self._write()
            # the start has no steps by which it could be measured: weights are read, code is compiled
            if stuck_s > self._limit_s * (3 if self._phase == "start" else 1):
                self._on_stuck(self._folder, stuck_s)

    def _write(self) -> None:
        phase_s = time.perf_counter() - self._since
        doing, waits_in = self._look() if phase_s > LONG_S else ("", "")
        beat = Beat(
            dist.rank(), dist.world_size(), platform.node(), os.getpid(), self._attempt, self._step, self._steps,
            self._phase, round(phase_s, 3), doing[:120], waits_in, self._ended[:120],
            os.environ.get(KEPT_BY, ""), pid_space(), {k: round(v, 4) for k, v in self._seconds.items() if v},
            max(0, self._step - self._first - 1),
        )  # fmt: skip
        said = asdict(beat)
        del said["silent_s"], said["age_s"]
        text = json.dumps(said)
        with suppress(OSError):  # a full disk is said by what is lost through it
            os.pwrite(self._file, text.encode().ljust(BYTES - 1) + b"\n", 0)

    def _look(self) -> tuple[str, str]:
        """Where the main thread is: our innermost function, and the collective operation that it is in."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        ours, collective = "", ""
        while frame is not None:
            file, name = Path(frame.f_code.co_filename), frame.f_code.co_name
            if file.parts[-2:] == ("distributed", "distributed_c10d.py") and not name.startswith(("_", "wrapper")):
                collective = name  # the outermost, which our code called
            elif name == "_engine_run_backward":
                collective = "the reduction of gradients"
            if not ours and PACKAGE in file.parents:
                ours = f"{name}, {file.relative_to(PACKAGE)}:{frame.f_lineno}"
            frame = frame.f_back
        return ours, collective


_heart: Heart | None = None


def enter(phase: str, step: int | None = None) -> None:
    """This rank is in another phase now, of PHASES; `step`, from 1, where one begins. Nothing where no heart beats."""
    if _heart is not None:
        _heart.enter(phase, step)


def place() -> tuple[str, int]:
    """The phase that this rank is in, and its step, from 1; nowhere where no heart beats."""
    return _heart.place if _heart is not None else ("", 0)


@contextmanager
def beating(
    folder: Path, attempt: int, steps: int, limit_s: float, on_stuck: Callable[[Path, float], None]
) -> Iterator[None]:
    """Beats within it."""
    global _heart
    _heart, before = Heart(folder, attempt, steps, limit_s, on_stuck), _heart
    try:
        yield
        _heart.stop("well")
    except BaseException as error:
        _heart.stop(str(error).partition("\n")[0] or type(error).__name__)
        raise
    finally:
        _heart = before


def straggler(beats: list[Beat]) -> str | None:
    """Who makes the others wait, where someone does by a tenth of a step: by what no rank shares, data and forward."""
    timed = [beat for beat in beats if beat.timed_steps]
    if len(timed) < 2:
        return None
    step_s = sum(timed[0].seconds.values()) / timed[0].timed_steps
    worst: tuple[float, str] | None = None
    for phase in ("data", "forward"):
        each = sorted((beat.seconds.get(phase, 0.0) / beat.timed_steps, beat.rank) for beat in timed)
        median = each[(len(each) - 1) // 2][0]
        most, rank = each[-1]
        if most - median > step_s / 10 and (worst is None or most - median > worst[0]):
            beat = next(b for b in timed if b.rank == rank)
            said = f"{beat.name} spends {most:.3f} s a step in {PHASES[phase]}, the median {median:.3f} s: others wait"
            worst = (most - median, said)
    return worst[1] if worst else None
