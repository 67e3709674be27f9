"""Who waits for whom: a sentence from the ranks' heartbeats, said before a stuck run is ended."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from snell_dist import dist, log
from snell_dist.config import UserError
from snell_dist.exits import Exit
from snell_dist.heartbeat import FOLDER, PHASES, Beat, read

ORDER = list(PHASES)
SILENT_S = 5.0  # a rank that beats so much later than the others is dead, stopped or cut off
SHOWN = 4  # ranks that are named one by one


def diagnose(beats: Sequence[Beat]) -> list[str]:
    """What the beats of one attempt say, the likely cause first; empty where there are none.

    Ranks that gave no sign of life come first, then those that ended, then those that are behind the others and in no
    collective operation. Where everybody waits at the same place, the network is named.
    """
    silent = [b for b in beats if b.silent_s > SILENT_S and not b.ended]
    ended = [b for b in beats if b.ended and b.ended != "well"]
    there = [b for b in beats if b not in silent and not b.ended]
    said = [
        f"{b.name} gives no sign of life since {b.silent_s:.0f} s (then in {_place(b)}): its process was killed or"
        " stopped, or its node or link is gone"
        for b in silent[:SHOWN]
    ]
    said += [f"{b.name} ended in {_place(b)}: {b.ended}" for b in ended[:SHOWN]]
    missing = (beats[0].world_size - len(beats)) if beats else 0
    if missing:
        known = {b.rank for b in beats}
        absent = [str(r) for r in range(beats[0].world_size) if r not in known]
        said.append(f"rank {', '.join(absent[:SHOWN])} never began ({missing} of {beats[0].world_size})")
    if not there:
        return said
    behind = min((b.step, ORDER.index(b.phase)) for b in there)
    stopped = [b for b in there if (b.step, ORDER.index(b.phase)) == behind]
    others = [b for b in there if b not in stopped]
    if not others:  # all at one place: whoever is in no collective operation keeps the others
        alone = [b for b in stopped if not b.waits_in]
        if alone:
            others, stopped = [b for b in stopped if b.waits_in], alone
    if others and not silent and all(b.waits_in for b in there):  # as when a link is cut between two operations
        where = dict.fromkeys(f"{_waiting(b)} ({b.name})" for b in (*stopped[:SHOWN], *others[:1]))
        said.append(
            f"no rank is at work, and they wait in {' and in '.join(where)}: {_network(there)} has failed, or"
            " they went different ways"
        )
    elif others or not stopped[0].waits_in:
        said += [f"{b.name} stopped in {_place(b)} {b.phase_s:.0f} s ago{_doing(b)}" for b in stopped[:SHOWN]]
        if others:
            said[-1] += f"; {_who(others)} in {_waiting(others[0])}"
    elif not said:
        since = f"since {stopped[0].phase_s:.0f} s"
        said.append(f"all ranks wait in {_waiting(stopped[0])} {since}: {_network(stopped)} has failed")
    else:
        said[-1] += f"; {_who(stopped)} in {_waiting(stopped[0])}"
    return said


def _network(beats: Sequence[Beat]) -> str:
    hosts = sorted({b.host for b in beats})
    return f"the network between {', '.join(hosts[:SHOWN])}" if len(hosts) > 1 else f"the network of {hosts[0]}"


def _place(beat: Beat) -> str:
    return f"{PHASES[beat.phase]} at step {beat.step}" if beat.step else PHASES[beat.phase]


def _doing(beat: Beat) -> str:
    return f" ({beat.doing})" if beat.doing else ""


def _who(beats: Sequence[Beat]) -> str:
    return f"{beats[0].name} waits" if len(beats) == 1 else "the others wait"


def _waiting(beat: Beat) -> str:
    return f"{beat.waits_in or PHASES[beat.phase]} at step {beat.step}"


def end(folder: Path, stuck_s: float) -> None:
    """Ends this process, after one of the ranks has said why. For the thread that found it stuck for so long."""
    beats = read(folder)
    said = "; ".join(diagnose(beats)) or f"stuck since {stuck_s:.0f} s"
    _write_flight(folder)
    attempt = max((b.attempt for b in beats), default=0)
    with suppress(OSError):  # the first to come speaks, whoever it is
        note = os.open(folder / FOLDER / f"hang_{attempt:04d}.txt", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(note, f"{said}\n".encode())
        os.close(note)
        log.LOGGER.error(f"no progress for {stuck_s:.0f} s (train.hang_timeout_s): {said}")
    sys.stderr.flush()
    os._exit(Exit.HUNG)


def note(folder: Path) -> tuple[int, str] | None:
    """The newest attempt that was ended for standing still, and what was said then."""
    found = sorted((folder / FOLDER).glob("hang_*.txt"))
    return (int(found[-1].stem.partition("_")[2]), found[-1].read_text().strip()) if found else None


def report(folder: Path) -> list[str]:
    """What can be said of a run that stands still, or stood still when it ended. UserError where no rank ever beat."""
    beats = read(folder)
    if not beats:
        raise UserError(f"doctor hang: {folder}: no rank has left a heartbeat there")
    lives = [b for b in beats if b.lives(SILENT_S)]
    if lives and max(b.phase_s for b in lives) < SILENT_S and len(lives) == len(beats):
        step = max(b.step for b in lives)
        return [f"nothing hangs: {len(lives)} ranks at step {step} of {lives[0].steps}"]
    if all(b.ended == "well" for b in beats):
        return [f"nothing hangs: {len(beats)} ranks have ended, complete or asked to stop"]
    said = diagnose(beats) if lives else []
    ended = note(folder)
    if ended:
        said.append(f"a watchdog ended attempt {ended[0]}: {ended[1]}")
        said += flights(folder)
    if not said:
        said = [f"{b.name} ended in {_place(b)}: {b.ended or 'without a word, killed'}" for b in beats]
    return said


def _write_flight(folder: Path) -> None:
    """torch's flight recorder: the last collective operations that this rank entered, as JSON."""
    import torch

    with suppress(Exception):  # it depends on how torch was built, and we are about to leave
        recorded = torch._C._distributed_c10d._dump_fr_trace_json()  # type: ignore[attr-defined]
        (folder / FOLDER / f"flight_{dist.rank():05d}.json").write_text(
            recorded if isinstance(recorded, str) else recorded.decode()
        )


def flights(folder: Path) -> list[str]:
    """The last collective operation of each rank that left a recording: its number, name and state."""
    said = []
    for file in sorted((folder / FOLDER).glob("flight_*.json")):
        with suppress(OSError, ValueError, KeyError, IndexError):
            last: dict[str, Any] = json.loads(file.read_text())["entries"][-1]
            rank = int(file.stem.partition("_")[2])
            said.append(f"rank {rank}: {last['profiling_name']} (number {last['collective_seq_id']}, {last['state']})")
    return said
