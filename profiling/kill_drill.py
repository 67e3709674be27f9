"""Kills training at random moments while it saves every step, and looks at what is left; then resumes, and kills again.

    python profiling/kill_drill.py [--kills 200] [--seed 0] [--only fsdp] [--out profiling/results/kill_drill]

Every life is a real `snell train`, by torchrun where there are several ranks, and dies by SIGKILL: one rank of it, all
ranks, or the launcher (whose workers are then killed, too). One life of eight dies while it starts; the others once two
or three of their steps are done, at a moment drawn from one and a half steps, most of which is saving.

After each death the newest checkpoint must be what it says (hashes, and every tensor read), and at most one save behind
the last step that metrics.jsonl shows, two where saves go on in the background; metrics.jsonl must have every step that
is in it. At the end the run finishes, and its adapter must be that of a run that nobody killed, to the last bit.

torn         a folder that the package takes for whole and is not
lost         deaths after which the newest checkpoint was older than allowed, or metrics.jsonl lacked a step
hung         deaths of one or all ranks that the launcher did not end by within HANG_S
temporary    deaths that left a folder which is no checkpoint: that many fell into the writing or deleting of one
left         such folders when the run was done

Writes OUT.json, OUT.md after each run; rows of other runs that are there already stay.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from demo import environment, where_run
from torch import Tensor

from snell_dist import log
from snell_dist.adapter import ADAPTER
from snell_dist.checkpoint import FOLDER, LATEST, finished
from snell_dist.config import UserError
from snell_dist.tensor_files import read_tensors

SMALL = [
    *("backbone.weights=null", "backbone.width=16", "backbone.depth=2", "backbone.heads=2", "method.rank=4"),
    *("data.batch_size=12", "train.log_every=1", "train.save_every=1", "train.eval_every=null", "train.device=cpu"),
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
METRICS = "metrics.jsonl"
STEPS = 6  # of the run for each kill: a life does fewer
START_S, HANG_S, FINISH_S = 300, 90, 900  # time-outs
POLL_S = 0.01


@dataclass(frozen=True)
class Case:
    """One run to kill. `share`: of 200 kills."""

    name: str
    ranks: int
    engine: tuple[str, ...]
    background: bool
    share: int

    @property
    def overrides(self) -> list[str]:
        return [*SMALL, *self.engine, f"train.save_in_background={str(self.background).lower()}"]


ENGINES = {
    "one process": (1, ("engine.name=ddp",), (35, 35)),
    "ddp": (2, ("engine.name=ddp",), (25, 25)),
    "fsdp": (2, ("engine.name=fsdp",), (25, 25)),
    "zero 1": (2, ("engine.name=zero", "engine.stage=1"), (8, 7)),
    "zero 3": (2, ("engine.name=zero", "engine.stage=3"), (8, 7)),
}
CASES = [
    Case(name, ranks, engine, background, share)
    for name, (ranks, engine, shares) in ENGINES.items()
    for background, share in zip((False, True), shares, strict=True)
]


@dataclass
class Tally:
    """What became of one run."""

    name: str
    background: bool
    kills: dict[str, int] = field(default_factory=dict)  # by victim
    starting: int = 0  # of them, before a step was done
    torn: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    hung: int = 0
    temporary: int = 0
    left: list[str] = field(default_factory=list)
    first_step_s: list[float] = field(default_factory=list)  # from each start
    failed: str | None = None  # how a life ended that nobody had killed
    equal: bool | None = None  # the adapter, with that of the run that nobody killed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--out", type=Path, default=Path("profiling/results/kill_drill"))
    args = parser.parse_args()
    log.LOGGER.setLevel("ERROR")  # what is damaged and passed over is counted here
    args.out.parent.mkdir(parents=True, exist_ok=True)
    file, said = args.out.with_suffix(".json"), {"seed": args.seed, "environment": environment()}
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    chosen = [case for case in CASES if case.name in args.only]
    kills = {case: max(1, round(args.kills * case.share / sum(c.share for c in chosen))) for case in chosen}
    with tempfile.TemporaryDirectory() as place:
        for name in args.only:
            cases = [case for case in chosen if case.name == name]
            steps = STEPS * max(kills[case] for case in cases)
            adapter = whole(cases[0], steps, Path(place) / name)
            for case in cases:
                draw = random.Random(f"{args.seed} {name} {case.background}")
                folder = Path(place) / f"{name} {case.background}"
                tally = drill(case, kills[case], steps, draw, folder, adapter)
                row = asdict(tally) | said
                rows = [r for r in rows if (r["name"], r["background"]) != (name, case.background)] + [row]
                file.write_text(json.dumps(rows, indent=1))
                args.out.with_suffix(".md").write_text(markdown(rows))
                print(row, file=sys.stderr)
    print(markdown(rows))
    return 0 if all(map(sound, rows)) else 1


def whole(case: Case, steps: int, folder: Path) -> dict[str, Tensor]:
    """The adapter of a run that nobody kills."""
    with Life(case, steps, folder) as life:
        if life.ends() != 0:
            raise SystemExit(f"{case.name}: the run that nobody killed failed: {life.said()}")
    return read_tensors(folder / ADAPTER)


def drill(
    case: Case, kills: int, steps: int, draw: random.Random, folder: Path, adapter: Mapping[str, Tensor]
) -> Tally:
    """Kills a run so many times, then lets it finish. `adapter`: what it must come to."""
    tally = Tally(case.name, case.background)
    shown = saved = 0  # the most steps that metrics.jsonl has shown; those in the newest checkpoint
    for _ in range(kills):
        with Life(case, steps, folder) as life:
            if not _lives(life, saved, draw, tally):
                tally.failed = life.said()
                return tally
            victim, quick = life.dies(draw)
        tally.kills[victim] = tally.kills.get(victim, 0) + 1
        tally.hung += not quick
        shown = max(shown, last_step(folder))
        saved = _look(folder, shown, saved, tally)
    with Life(case, steps, folder) as life:
        if life.ends() != 0:
            tally.failed = life.said()
            return tally
    kept = {LATEST, *(c.path.name for c in finished(folder))}
    tally.left = sorted(p.name for p in (folder / FOLDER).iterdir() if p.name not in kept)
    found = read_tensors(folder / ADAPTER)
    tally.equal = found.keys() == adapter.keys() and all(torch.equal(found[name], t) for name, t in adapter.items())
    return tally


def _lives(life: Life, saved: int, draw: random.Random, tally: Tally) -> bool:
    """Waits for the moment at which this life is to die; False where it ended by itself, or did nothing in time."""
    if tally.first_step_s and draw.random() < 1 / 8:
        tally.starting += 1
        time.sleep(draw.uniform(0, statistics.median(tally.first_step_s)))
        return life.process.poll() is None
    moments: list[float] = []
    for n in range(1, draw.choice([2, 3]) + 1):
        if not life.does(saved + n):
            return False
        moments.append(time.perf_counter())
    tally.first_step_s.append(moments[0] - life.began)
    time.sleep(draw.uniform(0, 1.5 * (moments[-1] - moments[-2])))
    return life.process.poll() is None


def _look(folder: Path, shown: int, saved: int, tally: Tally) -> int:
    """Judges what a death left. `saved`: before this life. Returns the steps in the newest checkpoint."""
    found = finished(folder)
    for one in found:
        problem = one.damage(contents=True)
        try:
            broken = [key for key, tensor in one.tensors().items() if not tensor.isfinite().all()]
        except UserError as error:
            broken = [str(error)]
        if problem or broken:
            tally.torn.append(f"{one.path.name}: {problem or broken}")
    step = found[-1].meta.step if found else 0
    if step < max(saved, shown - (2 if tally.background else 1)):
        tally.lost.append(f"step {shown} was done, {saved} saved before, and {step} is the newest")
    missing = sorted(set(range(1, step + 1)) - set(steps_in(folder)))
    if missing:
        tally.lost.append(f"metrics.jsonl lacks {len(missing)} of {step} steps")
    names = {p.name for p in (folder / FOLDER).glob("*step_*")} if (folder / FOLDER).is_dir() else set()
    tally.temporary += bool(names - {one.path.name for one in found})
    return step


class Life:
    """A run from its start or its newest checkpoint to its end. With the block its last process ends."""

    def __init__(self, case: Case, steps: int, folder: Path) -> None:
        self._ranks, self._metrics, self._log = case.ranks, folder / METRICS, folder.with_name(f"{folder.name}.log")
        self._earlier = _inode(self._metrics)
        python = [sys.executable, "-m"]
        launcher = [*python, "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}", "-m"]
        command = [*(launcher if case.ranks > 1 else python), "snell_dist", "train", "demo", *case.overrides]
        command += [f"train.steps={steps}", "--folder", str(folder)]
        if (folder / "config.yaml").exists():
            command.append("--resume")
        self.began = time.perf_counter()
        with self._log.open("w") as stream:
            self.process = psutil.Popen(command, stdout=stream, stderr=stream, env=ENVIRONMENT)

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *error: object) -> None:
        _end(_family(self.process))

    def does(self, step: int) -> bool:
        """Waits until metrics.jsonl, which each life replaces, shows this step; False where it does not come to it."""
        while _inode(self._metrics) == self._earlier or last_step(self._metrics.parent) < step:
            if self.process.poll() is not None or time.perf_counter() - self.began > START_S:
                return False
            time.sleep(POLL_S)
        return True

    def dies(self, draw: random.Random) -> tuple[str, bool]:
        """Kills and says whom, and whether the others ended by themselves in time; returns when no process is left."""
        everyone = _family(self.process)
        ranks = self.process.children() if self._ranks > 1 else []
        alone = "launcher" if self._ranks > 1 else "process"  # of torchrun, before it has started any rank
        victim = draw.choice(["one rank", "all ranks", "launcher"]) if ranks else alone
        chosen = {"one rank": draw.sample(ranks, min(1, len(ranks))), "all ranks": ranks}
        for process in chosen.get(victim, [self.process]):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if victim == "launcher":
            time.sleep(draw.uniform(0, 0.5))  # its ranks go on, and are killed a little later
            _end(everyone)
        _, alive = psutil.wait_procs(everyone, timeout=HANG_S)
        _end(alive)
        return victim, not alive

    def ends(self) -> int | None:
        """The exit status; None where it takes too long."""
        try:
            return self.process.wait(FINISH_S)
        except psutil.TimeoutExpired:
            return None

    def said(self) -> str:
        """The end of what it wrote."""
        return f"exit status {self.process.poll()}: {self._log.read_text()[-2000:]}"


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _end(processes: list[psutil.Process]) -> None:
    """Kills them and what they have started, and waits for their end."""
    everyone = {each for process in processes for each in _family(process)}
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(everyone, timeout=HANG_S)


def _inode(file: Path) -> int | None:
    return file.stat().st_ino if file.exists() else None


def steps_in(folder: Path) -> list[int]:
    """The steps, from 1, of the whole lines of metrics.jsonl."""
    file = folder / METRICS
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line)["step"] + 1 for line in lines]


def last_step(folder: Path) -> int:
    return max(steps_in(folder)[-1:], default=0)


def sound(row: dict[str, Any]) -> bool:
    return bool(row["equal"]) and not (row["torn"] or row["lost"] or row["hung"] or row["left"] or row["failed"])


HEADINGS = ["run", "saves", "kills", "one rank", "all ranks", "launcher", "while starting", "temporary"]
HEADINGS += ["**torn**", "**lost**", "**hung**", "**left**", "start to first step", "most", "**bit-equal**"]


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [HEADINGS, ["---"] * 2 + ["---:"] * (len(HEADINGS) - 2)]
    for row in rows:
        kills, seconds = row["kills"], row["first_step_s"]
        by_victim = [str(kills.get(victim, 0)) for victim in ("one rank", "all ranks", "launcher")]
        bad = [f"**{n}**" for n in (len(row["torn"]), len(row["lost"]), row["hung"], len(row["left"]))]
        times = [f"{statistics.median(seconds):.1f} s", f"{max(seconds):.1f} s"] if seconds else ["", ""]
        equal = "failed" if row["failed"] else "yes" if row["equal"] else "no"
        counts = [str(sum(kills.values())), *by_victim, str(row["starting"]), str(row["temporary"])]
        saves = "background" if row["background"] else "foreground"
        lines.append([row["name"], saves, *counts, *bad, *times, f"**{equal}**"])
    total = sum(sum(row["kills"].values()) for row in rows)
    where = dict.fromkeys(where_run(row["environment"]) for row in rows)
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", f"{total} kills.", "", *where, ""])


if __name__ == "__main__":
    sys.exit(main())
