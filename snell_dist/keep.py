"""`snell keep`: starts a run's command again until the run is complete, and knows when to stop trying.

    outcome of the command                        what follows
    the run is complete                           done (0)
    bad input, said by a rank                     the end (2): another attempt would end the same way
    out of memory, said by a rank                 the end (78), for the same reason
    a rank, a node, a disk or the network failed  again; in a Slurm job the second time from the queue, on other nodes
    all ranks are gone, and the command waits on  it is ended, and again; in a Slurm job from the queue
    K failures in a row without a new checkpoint  the end (76)
    asked to stop, and saved                      the end (75); after SIGUSR1 in a Slurm job back to the queue

Launchers tell little of how their ranks ended, so ranks leave a verdict in the run folder. In the other direction a
file in the run folder asks all ranks to save and stop; no signal has to find its way through srun, ssh and agents.
Nothing here imports torch: the command is started at once.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Literal

from snell_dist import dist, heartbeat, limits, run_folder
from snell_dist.config import UserError, trouble
from snell_dist.exits import Exit

VERDICTS, LAUNCHES = ".verdicts.jsonl", ".launches.jsonl"
ALIVE_S = 10.0  # a younger heartbeat is of a rank that lives
POLL_S, LOOK_S = 0.2, 5.0
SILENT = "all ranks were gone, and the command waited on"
END_S = 15.0  # from SIGTERM to SIGKILL
MOST_PAUSE_S = 300.0

Outcome = Literal["complete", "bad input", "out of memory", "interrupted", "failed", "gave up"]
FOR_GOOD: dict[Outcome, Exit] = {"bad input": Exit.BAD_INPUT, "out of memory": Exit.OUT_OF_MEMORY}


@dataclass(frozen=True)
class Launch:
    """One start of the command. `saved_at`: of the newest checkpoint then; `outcome` is empty where nobody saw it."""

    began: str
    host: str
    job: str | None
    restarts: int  # of that job
    saved_at: int
    outcome: str = ""
    status: int | None = None  # of the command
    why: str = ""


def keep(folder: Path, command: Sequence[str], attempts: int, grace_s: float, pause_s: float, silence_s: float) -> int:
    """Runs the command until the run in `folder` is complete. Returns what `exits` lists.

    attempts: failures in a row without a newer checkpoint; in a Slurm job those before it was put back into the queue
    count, elsewhere the same command begins to count anew.
    grace_s: from a request to stop to the end of the ranks.
    silence_s: without a sign of life of any rank, once there were some, after which the command is ended: a launcher
    may wait for good for a node that is gone.

    UserError where there is nothing to run.
    """
    if not command:
        raise UserError("keep: no command; say snell keep RUN -- COMMAND ... --folder RUN --resume-if-any")
    if "--resume-if-any" not in command:
        raise UserError(f"keep: {shlex.join(command)}: must have --resume-if-any, to begin the run and to continue it")
    if attempts < 1:
        raise UserError(f"keep: --attempts {attempts}: must be at least 1")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise trouble(f"keep: {folder}: cannot be made", error) from None
    job = os.environ.get("SLURM_JOB_ID")
    requests, made = _Requests(), [launch for launch in launches(folder) if job and launch.job == job]
    while True:
        if run_folder.is_complete(folder):
            _say(f"{folder} is complete")
            return Exit.DONE
        before = run_folder.saved_at(folder)
        stalled = stalls(made, before)
        if stalled >= attempts:
            last = f", the last one with: {made[-1].why}" if made[-1].why else ""
            _say(f"{stalled} attempts in a row ended without a new checkpoint{last}; giving up, see {folder}/train.log")
            _append(folder / LAUNCHES, asdict(replace(made[-1], outcome="gave up")))  # the next one counts anew
            return Exit.GAVE_UP
        launch = _once(folder, command, grace_s, silence_s, requests)
        made.append(launch)
        if launch.outcome == "complete":
            return Exit.DONE
        if launch.outcome in FOR_GOOD:
            _say(f"not started again, since it would end the same way: {launch.why}")
            return FOR_GOOD[launch.outcome]
        if requests.received is not None or launch.outcome == "interrupted":
            return _leave(requests, job)
        stalled = stalls(made, run_folder.saved_at(folder))
        said = f"the command ended with {launch.status}{f' ({launch.why})' if launch.why else ''}"
        # Where a node lost all its processes Slurm may take it for busy with them, and starts nothing else there.
        if (stalled >= 2 or launch.why == SILENT) and stalled < attempts and job and _requeue(job):
            often = f", {stalled} times in a row without a new checkpoint" if stalled >= 2 else ""
            _say(f"{said}{often}: back to the queue, for other nodes")
            return Exit.MACHINE
        if stalled < attempts:
            pause = min(pause_s * 2 ** max(0, stalled - 1), MOST_PAUSE_S)
            _say(f"{said}; starting again in {pause:.0f} s ({stalled} of {attempts} without a new checkpoint)")
            if requests.wait(pause):
                return _leave(requests, job)


def _leave(requests: _Requests, job: str | None) -> int:
    back = requests.received == signal.SIGUSR1 and job and _requeue(job)
    _say("stopped as asked; " + ("back to the queue" if back else "the same command goes on from there"))
    return Exit.INTERRUPTED


def _once(folder: Path, command: Sequence[str], grace_s: float, silence_s: float, requests: _Requests) -> Launch:
    """One start of the command, to its end and that of its ranks."""
    _clear(folder, grace_s)
    verdicts, killed = folder / VERDICTS, limits.kills()
    offset = verdicts.stat().st_size if verdicts.exists() else 0
    launch = Launch(
        _now(), platform.node(), os.environ.get("SLURM_JOB_ID"),
        int(os.environ.get("SLURM_RESTART_COUNT", "0")), run_folder.saved_at(folder),
    )  # fmt: skip
    try:
        environment = os.environ | {heartbeat.KEPT_BY: _name()}
        child = subprocess.Popen(command, env=environment, preexec_fn=dist.end_with_parent)
    except OSError as error:
        raise UserError(f"keep: {command[0]}: cannot be started: {error.strerror}") from None
    _append(folder / LAUNCHES, asdict(launch))
    due: float | None = None  # when the command is to end, if its ranks have not ended it by then
    known = max((beat.attempt for beat in heartbeat.read(folder)), default=0)
    heard: float | None = None  # when a rank of this start last lived
    looks, silent = 0.0, False
    while child.poll() is None:
        time.sleep(POLL_S)
        now = time.monotonic()
        if requests.received is None:
            if now < looks:
                continue
            looks = now + min(LOOK_S, silence_s / 4)  # of many ranks seldom
            heard = now if _alive(folder, _name(), known) else heard
            if heard is None or now - heard < silence_s:
                continue
            if not silent:
                _say(f"no rank has given a sign of life for {silence_s:.0f} s, and the command waits: ending it")
            silent, due = True, due or now
            _end(child, late=now > due + END_S)
            continue
        _ask(folder)  # again and again: ranks that are starting look later
        if due is None:
            due = now + (grace_s if _alive(folder) else 0.0)
        elif not _alive(folder):
            due = min(due, now + END_S)
        if requests.urgent or now > due:
            _end(child, late=requests.urgent > 1 or now > due + END_S)
    status, why = _verdict(verdicts, offset)
    why = SILENT if silent else why
    if status is None and (killed := limits.kills() - killed) > 0:  # a rank that the kernel ends says nothing
        why = f"the kernel ended {killed} process{'es' * (killed > 1)} here for want of memory{_allowed()}"
    outcome: Outcome = "failed"
    if run_folder.is_complete(folder):
        outcome = "complete"
    elif status in FOR_GOOD.values():
        outcome = next(each for each, ends in FOR_GOOD.items() if ends == status)
    elif status == Exit.INTERRUPTED and (folder / run_folder.STOP).exists():
        outcome = "interrupted"  # else a launcher died, which its ranks hear as SIGTERM
    ended = replace(launch, outcome=outcome, status=child.returncode, why=why)
    _append(folder / LAUNCHES, asdict(ended))
    return ended


def _end(child: subprocess.Popen, late: bool) -> None:
    child.kill() if late else child.terminate()


def _allowed() -> str:
    said = [f"{size / 2**20:.0f} MiB by {name}" for name, size in limits.limits().items()]
    return f"; allowed are {', '.join(said)}" if said else ""


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")


class _Requests:
    """Signals to this process, from now on."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.urgent = 0
        for number in dist.SIGNALS:
            signal.signal(number, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.urgent += self.received is not None and number == signal.SIGINT
        # a time limit's warning comes first, and the job is put back even if it is then ended
        self.received = self.received if self.received == signal.SIGUSR1 else number

    def wait(self, seconds: float) -> bool:
        """Whether a request came within so long."""
        end = time.monotonic() + seconds
        while self.received is None and time.monotonic() < end:
            time.sleep(POLL_S)
        return self.received is not None


def stop(folder: Path, within_s: float) -> str:
    """Has the run in `folder` save and stop. Returns what there is to say; UserError where nothing trains there."""
    run_folder.config_of(folder)
    if not _alive(folder):
        raise UserError(f"stop: {folder}: nothing is training there")
    end = time.monotonic() + within_s
    while _alive(folder):
        if time.monotonic() > end:
            raise UserError(
                f"stop: {folder}: still trains after {within_s:.0f} s; snell doctor hang {folder} says where"
            )
        _ask(folder)
        time.sleep(POLL_S)
    return f"{folder}: stopped; continue with snell train ... --resume --folder {folder}"


def leave_verdict(folder: Path, status: Exit, why: str) -> None:
    """For whoever keeps the run: how this rank ended. Nothing where no run folder is."""
    if folder.is_dir():
        said = {"status": int(status), "why": why.partition("\n")[0], "rank": dist.rank(), "host": dist.host()}
        _append(folder / VERDICTS, said)


def launches(folder: Path) -> list[Launch]:
    """What was started there, the first one first; a start and its end are one."""
    found: dict[tuple[str, str], Launch] = {}
    for said in _lines(folder / LAUNCHES):
        launch = Launch(**said)
        found[launch.began, launch.host] = launch
    return list(found.values())


def stalls(made: Sequence[Launch], saved_at: int) -> int:
    """Failures in a row, up to the last one, since the newest checkpoint was completed."""
    count = 0
    for launch in reversed(made):
        if launch.saved_at != saved_at or launch.outcome not in ("failed", ""):
            break
        count += 1
    return count


def _clear(folder: Path, grace_s: float) -> None:
    """Ranks of an earlier start that still live save and end first; then nobody is asked to stop.

    Those that were started elsewhere stay: one of several nodes that train together comes back.
    """
    end = time.monotonic() + grace_s
    while _alive(folder, _name()) and time.monotonic() < end:
        _ask(folder)
        time.sleep(POLL_S)
    (folder / run_folder.STOP).unlink(missing_ok=True)


def _ask(folder: Path) -> None:
    """For all ranks to save and stop. On a full disk it may fail, and SIGTERM comes later."""
    with suppress(OSError):
        (folder / run_folder.STOP).touch()


def _alive(folder: Path, kept_by: str | None = None, after: int = 0) -> bool:
    """Whether some rank trains there, by its heartbeat; `kept_by`: of those that this one started, or nobody.

    after: of later attempts.
    """
    return any(
        beat.lives(ALIVE_S)
        for beat in heartbeat.read(folder)
        if (kept_by is None or beat.kept_by in ("", kept_by)) and beat.attempt > after
    )


def _name() -> str:
    """The same when this command is started again: of the Slurm job, wherever it runs, or of this machine."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"job {job}" if job else platform.node()


def _requeue(job: str) -> bool:
    """Puts the Slurm job back into the queue, which ends this process; False where Slurm does not."""
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _say(f"scontrol requeue {job}: {error}")
        return False
    if done.returncode:
        _say(f"scontrol requeue {job}: {done.stderr.strip()}")
    return done.returncode == 0


def _verdict(file: Path, offset: int) -> tuple[int | None, str]:
    """What the ranks of the last start left; what ends it for good counts before all, then a request to stop."""
    said = _lines(file, offset)
    for status in (*FOR_GOOD.values(), Exit.INTERRUPTED):
        for line in said:
            if line["status"] == status:
                return status, line["why"]
    return (said[0]["status"], said[0]["why"]) if said else (None, "")


def _append(file: Path, said: dict[str, object]) -> None:
    with suppress(OSError), file.open("a", encoding="utf-8") as stream:  # a full disk ends no run by this
        stream.write(json.dumps(said) + "\n")


def _lines(file: Path, offset: int = 0) -> list[dict]:
    if not file.exists():
        return []
    found = []
    for line in file.read_bytes()[offset:].splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off by a full disk or a crash
            continue
    return found


def _say(message: str) -> None:
    print(f"snell keep: {message}", file=sys.stderr, flush=True)
