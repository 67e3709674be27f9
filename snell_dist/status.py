"""`snell status` and `snell logs`: how a run is, and what it said, from its folder alone and while it works."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from snell_dist import hang, heartbeat, keep, log, run_folder

STALE_S = 15.0  # without a heartbeat a run does not train
LATE = 3.0  # times a step's length without a step: standing still
RECENT = 20  # records from which the rate is taken
POLL_S = 0.5
STAMP = "2026-01-31 12:00:00,000"
BEGINS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \[rank \d+\] ")


@dataclass(frozen=True)
class Attempt:
    """One start of the run."""

    number: int
    started: str
    hosts: list[str]
    world_size: int
    job: str | None
    device: str


@dataclass(frozen=True)
class Status:
    """`state`: complete, training, stuck, stopped (asked to) or dead. Times in seconds."""

    folder: str
    state: str
    attempts: list[Attempt]
    launches: list[keep.Launch]
    step: int
    steps: int
    loss: float | None
    images_per_s: float | None
    steps_per_s: float | None
    left_s: float | None
    checkpoint: int | None  # steps in the newest
    checkpoint_age_s: float | None
    summary: dict[str, Any] | None
    straggler: str | None
    notes: list[str]  # who waits for whom, what the last watchdog said
    ranks: list[heartbeat.Beat]


def look(folder: Path) -> Status:
    """UserError where it is no run folder."""
    run_folder.config_of(folder)
    beats = heartbeat.read(folder)
    records = _records(folder / "metrics.jsonl")
    last = records[-1] if records else {}
    complete = run_folder.is_complete(folder)
    fresh = [b for b in beats if b.lives(STALE_S)]
    steps = max((b.steps for b in beats), default=0)
    step = max([b.step for b in fresh] or [int(last.get("step", -1)) + 1])
    rate = _rate(records)
    notes, state = [], "dead"
    if complete:
        state = "complete"
    elif fresh:
        limit = max(10.0, LATE / rate) if rate else 60.0
        state = "stuck" if min(b.phase_s + b.age_s for b in fresh) > limit else "training"
        notes = hang.diagnose(beats) if state == "stuck" or len(fresh) < len(beats) else []
    elif beats and all(b.ended == "well" for b in beats):
        state = "stopped"
    if state == "dead":
        ended = hang.note(folder)
        notes = [*([f"a watchdog ended attempt {ended[0]}: {ended[1]}"] if ended else []), *_ends(beats)]
    number, age = _checkpoint(folder)
    left = (steps - step) / rate if rate and steps and state == "training" else None
    attempts = [
        Attempt(i, a["started"], a.get("hosts", [a["host"]]), a["world_size"], a.get("job"), a["device"])
        for i, a in enumerate(run_folder.attempts(folder), 1)
    ]
    return Status(
        str(folder), state, attempts, keep.launches(folder), step, steps, last.get("loss"), last.get("images_per_s"),
        rate, left, number, age, run_folder.read_summary(folder) if complete else None, heartbeat.straggler(fresh),
        notes, beats,
    )  # fmt: skip


def text(status: Status) -> str:
    """For people."""
    done = f"step {status.step} of {status.steps}" if status.steps else f"step {status.step}"
    lines = [f"{status.folder}: {status.state}, {done}"]
    said = []
    if status.loss is not None:
        said.append(f"loss {status.loss:.4f}")
    if status.steps_per_s:
        said.append(f"{status.steps_per_s:.2g} steps/s")
    if status.images_per_s:
        said.append(f"{status.images_per_s:.0f} images/s")
    if status.left_s is not None:
        said.append(f"{duration(status.left_s)} left")
    if status.summary:
        said.append(f"test accuracy {status.summary['test_accuracy']:.4f}")
    if said:
        lines.append("  " + "  ".join(said))
    if status.checkpoint is not None and status.checkpoint_age_s is not None:
        lines.append(f"  checkpoint after step {status.checkpoint}, {duration(status.checkpoint_age_s)} ago")
    elif status.state != "complete":
        lines.append("  no checkpoint yet")
    lines += [f"  ! {note}" for note in status.notes]
    if status.straggler:
        lines.append(f"  ! {status.straggler}")
    rows = [["attempt", "started", "ranks", "hosts", "job"]]
    rows += [[str(a.number), a.started, str(a.world_size), _few(a.hosts), a.job or ""] for a in status.attempts]
    if status.attempts:
        lines += ["", *log.columns(rows, right=(0, 2))]
    failed = [each for each in status.launches if each.outcome not in ("", "complete")]
    lines += [f"{each.began}  on {each.host} {each.outcome}: {each.why or f'status {each.status}'}" for each in failed]
    if status.state in ("training", "stuck"):
        ranks = [["rank", "host", "step", "phase", "for"]]
        ranks += [[str(b.rank), b.host, str(b.step), b.phase, duration(b.phase_s + b.age_s)] for b in status.ranks]
        lines += ["", *log.columns(ranks[:65], right=(0, 2))]
    return "\n".join(lines)


def as_json(status: Status) -> str:
    return json.dumps(asdict(status), indent=1)


def duration(seconds: float) -> str:
    """In the unit that says most: 8 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def lines(folder: Path, rank: int | None, follow: bool) -> Iterator[str]:
    """What the ranks, or one of them, said, in the order of time; `follow`: until the run is complete."""
    run_folder.config_of(folder)
    read: dict[Path, int] = {}
    while True:
        over = run_folder.is_complete(folder)
        new = []
        for file in log.files(folder):
            with file.open("rb") as stream:
                stream.seek(read.get(file, 0))
                text = stream.read()
            read[file] = read.get(file, 0) + len(text)
            new += _messages(text.decode(errors="replace"))
        for said in sorted(new, key=lambda message: message[: len(STAMP)]):
            if rank is None or said.startswith(f"[rank {rank}]", len(STAMP) + 1):
                yield said
        if not follow or over:
            return
        time.sleep(POLL_S)


def _messages(text: str) -> list[str]:
    """Those of a log; one may have many lines."""
    found: list[str] = []
    for line in text.splitlines():
        if BEGINS.match(line) or not found:
            found.append(line)
        else:
            found[-1] += f"\n{line}"
    return found


def _records(file: Path) -> list[dict[str, Any]]:
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:  # at work on it
            continue
    return [record for record in found if "step_s" in record]


def _rate(records: list[dict[str, Any]]) -> float | None:
    """Steps a second of the newest records."""
    seconds = [record["step_s"] for record in records[-RECENT:]]
    return len(seconds) / sum(seconds) if seconds and sum(seconds) else None


def _checkpoint(folder: Path) -> tuple[int | None, float | None]:
    latest = folder / "checkpoints" / "latest"
    try:
        return int(latest.read_text().strip().removeprefix("step_")), time.time() - latest.stat().st_mtime
    except (OSError, ValueError):
        return None, None


def _ends(beats: list[heartbeat.Beat]) -> list[str]:
    return [f"{b.name} ended: {b.ended}" for b in beats if b.ended and b.ended != "well"][:4]


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, ..., {names[-1]} ({len(names)})"
