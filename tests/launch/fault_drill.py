"""Breaks training on two nodes in the ways in which clusters break, and looks at what becomes of it. Needs root.

    python tests/launch/fault_drill.py [--faults 56] [--seed 0] [--only slurm] [--out profiling/results/fault_drill]

slurm      sbatch --nodes=2 launch/slurm/torchrun.sbatch, under a real Slurm
torchrun   launch/torchrun.sh on both; on a node that was killed it is started again some seconds after, as by systemd
elastic    the same with NNODES=1:2: the second node is lost, the run goes on with one, the node comes back

A run meets all kinds of faults in random order, on either node in turn, each after a random number of steps since it
was back from the one before, then finishes undisturbed. Nodes are network namespaces (nodes.py), Slurm gives up a
silent one after 10 s, the watchdog ends a run that stands still for 10 s. All times come from the run's train.log.

launch       seconds from the fault to the start by `snell keep` that came back, empty where keep was not needed;
             before it Slurm was at work, which notices a death, requeues, waits for nodes, or whoever restarts one
first step   seconds from the fault to the first step of the next attempt; empty where the attempt went on
back         to the first step that had not been done before; where the attempt went on, to the end of the standstill
again        steps that were done twice
lost         an attempt that began from an older checkpoint than the newest whole one at the fault
hung         not back within HANG_S; then, and where a run ends by itself, the rest of its faults is left out
orphans      processes of the run on any node after its end
equal        the adapter, with that of a run that nobody disturbed: to the bit (elastic: the loss, to ROUNDING)

Writes OUT.json, OUT.md after each run; rows of other series that are there already stay.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import faults
from nodes import Nodes
from slurm import Slurm

from snell_dist import keep, log, run_folder
from snell_dist.adapter import ADAPTER
from snell_dist.checkpoint import finished
from snell_dist.tensor_files import read_tensors

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "profiling"))
from compare import environment, where_run  # noqa: E402
from kill_drill import steps_in  # noqa: E402

SETTINGS = [
    *("backbone.weights=null", "backbone.width=64", "backbone.depth=2", "method.rank=4", "data.batch_size=12"),
    *("train.device=cpu", "train.log_every=1", "train.save_every=20", "train.eval_every=null"),
    "train.hang_timeout_s=10",
]
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "GRACE": "30",
}
NETWORK = "10.79.0"
BETWEEN = 5, 85  # steps between being back and the next fault
DEAD_S = 10  # Slurm's, for a silent node
SHORT_S, LONG_S, FULL_S = 6.0, 25.0, 10.0  # two links and a disk
AWAY_S = 3.0, 20.0  # a dead node
SETTLE_S = 2.0  # of steps after the end of a fault: the attempt has survived it
HANG_S, START_S, FINISH_S, LEAVE_S = 400, 300, 900, 15  # time-outs
ROUNDING = 1e-6  # relative, of losses whose sums had another order
POLL_S = 0.1
SAID = re.compile(
    r"(?P<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(?P<ms>\d{3}) \[rank 0\] "
    r"((?P<begins>run folder)|resumed after step (?P<resumed>\d+)|step (?P<step>\d+)/)"
)


@dataclass
class Attempt:
    """What train.log says of one. Times in seconds since 1970."""

    began: float
    resumed: int = 0  # after this step
    steps: list[tuple[float, int]] = field(default_factory=list)

    @property
    def last(self) -> int:
        return self.steps[-1][1] if self.steps else 0


@dataclass
class Fault:
    """One, and what became of it."""

    kind: str
    where: str
    step: int  # the last that was shown
    saved: int  # the newest whole checkpoint, of steps
    launched_s: float | None = None
    first_s: float | None = None
    back_s: float | None = None
    joined_s: float | None = None  # elastic: from the start on the node that came back to a step of all
    again: int = 0
    attempts: int = 0  # that it took
    lost: str | None = None
    hung: bool = False


@dataclass
class Tally:
    """What became of one run."""

    series: str
    run: int
    faults: list[Fault] = field(default_factory=list)
    failed: str | None = None
    equal: bool | None = None
    difference: float | None = None  # of final losses, relative
    metrics: str | None = None  # what is wrong with metrics.jsonl
    orphans: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)  # what does not add up
    attempts: int = 0
    launches: int = 0
    requeues: int | None = None
    worlds: list[int] = field(default_factory=list)


class Lost(Exception):
    """The run ended, or stands still."""


class Training(ABC):
    """A run on the nodes, from its start to its end; the run folder is on a small disk."""

    def __init__(self, nodes: Nodes, disk: Path, steps: int) -> None:
        self.nodes, self.steps = nodes, steps
        self.folder, self.seen = disk / "run", nodes.path(disk) / "run"  # on the nodes; from here
        self.words = ["demo", *SETTINGS, f"train.steps={steps}"]

    def attempts(self) -> list[Attempt]:
        found: list[Attempt] = []
        file = self.seen / log.FILE
        for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
            said = SAID.match(line)
            if said is None:
                continue
            at = time.mktime(time.strptime(said["at"], "%Y-%m-%d %H:%M:%S")) + int(said["ms"]) / 1000
            if said["begins"]:
                found.append(Attempt(at))
            elif said["resumed"]:
                found[-1].resumed = int(said["resumed"])
            else:
                found[-1].steps.append((at, int(said["step"])))
        return found

    def shown(self) -> int:
        return max((a.last for a in self.attempts()), default=0)

    def saved(self) -> list[int]:
        return [c.meta.step for c in finished(self.seen)]

    def comes_to(self, step: int) -> None:
        """Waits for a step of a healthy run. Lost where it ends or stands still before."""
        shown, deadline = -1, time.monotonic() + START_S
        while (now := self.shown()) < step:
            if now > shown:
                shown, deadline = now, time.monotonic() + START_S
            if time.monotonic() > deadline:
                raise Lost(f"no step after {shown} within {START_S} s")
            self.check()
            time.sleep(POLL_S)

    def orphans(self) -> list[str]:
        """Processes of the run that are still there some seconds after its end."""
        deadline = time.monotonic() + LEAVE_S
        while (found := list(self._left())) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return found

    def _left(self) -> Iterator[str]:
        for node in self.nodes.names:
            for pid in self.nodes.processes(node):
                with suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                    if "snell" in words or "slurmstepd" in words:
                        yield f"{node}: {words[:200]}"

    def check(self) -> None:
        """Lost where it has ended."""
        if (problem := self.ended()) is not None:
            raise Lost(problem)

    @abstractmethod
    def start(self) -> None:
        """Begins."""

    @abstractmethod
    def ended(self) -> str | None:
        """How, where it will make no more steps."""

    @abstractmethod
    def revive(self, node: str) -> None:
        """What a node's own start brings up again."""

    @abstractmethod
    def kill(self, node: str) -> None:
        """All of the run's processes on a node."""

    @abstractmethod
    def finish(self) -> None:
        """Waits for the end. Lost where it is not a good one."""


class InSlurm(Training):
    def __init__(self, nodes: Nodes, disk: Path, steps: int, place: Path) -> None:
        super().__init__(nodes, disk, steps)
        self._place = place
        (place / "slurm").mkdir()
        self.slurm = Slurm(nodes, place / "slurm", DEAD_S)

    def start(self) -> None:
        script = ROOT / "launch/slurm/torchrun.sbatch"
        options = ["--nodes=2", "--gpus-per-node=1", f"--chdir={self._place}"]
        self.number = self.slurm.submit(*options, script, *self.words, env=ENVIRONMENT | {"RUN": str(self.folder)})

    def ended(self) -> str | None:
        job = self.slurm.job(self.number)
        return None if job.state in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") else f"the job is {job.state}"

    def revive(self, node: str) -> None:
        self.slurm.start(node)

    def kill(self, node: str) -> None:
        """All but slurmd."""
        for pid in self.nodes.processes(node):
            with suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() != "slurmd":
                    os.kill(pid, signal.SIGKILL)

    def finish(self) -> None:
        try:
            job = self.slurm.wait(self.number, timeout_s=FINISH_S)
        except TimeoutError as error:
            raise Lost(str(error)[:200]) from None
        if (job.state, job.exit_status) != ("COMPLETED", 0):
            raise Lost(f"the job is {job.state} with status {job.exit_status}")

    def requeues(self) -> int:
        return self.slurm.job(self.number).restarts


class ByHand(Training):
    def __init__(self, nodes: Nodes, disk: Path, steps: int, place: Path, nnodes: str) -> None:
        super().__init__(nodes, disk, steps)
        self._place = place
        self._env = ENVIRONMENT | {"NODES": " ".join(nodes.names), "NNODES": nnodes, "RUN": str(self.folder)}
        self._typed: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        for node in self.nodes.names:
            self.revive(node)

    def ended(self) -> str | None:
        statuses = {node: status for node, one in self._typed.items() if (status := one.poll()) is not None}
        return f"torchrun.sh ended: {statuses}" if statuses else None

    def revive(self, node: str) -> None:
        command = self.nodes.command(node, [ROOT / "launch/torchrun.sh", *self.words])
        with (self._place / f"{node}.out").open("ab") as stream:
            self._typed[node] = subprocess.Popen(command, env=self._env, stdout=stream, stderr=stream)

    def kill(self, node: str) -> None:
        self.gone(node)
        self.nodes.kill(node)

    def gone(self, node: str) -> None:
        self._typed.pop(node)

    def finish(self) -> None:
        deadline = time.monotonic() + FINISH_S
        statuses = {}
        for node, one in self._typed.items():
            try:
                statuses[node] = one.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise Lost(f"torchrun.sh on {node} goes on after the end") from None
        if any(statuses.values()):
            raise Lost(f"torchrun.sh ended: {statuses}")


# What goes wrong, on this node where it has a place: each does it and, where it lasts, ends it, and returns where.
Does = Callable[[Training, str, random.Random], str]


def a_rank(run: Training, node: str, draw: random.Random) -> str:
    victim = next(rank for rank in faults.ranks(run.nodes) if rank.node == node)
    victim.kill()
    return f"rank {victim.rank} on {node}"


def an_agent(run: Training, node: str, draw: random.Random) -> str:
    faults.kill_agent(run.nodes, node)
    return node


def processes(run: Training, node: str, draw: random.Random) -> str:
    run.kill(node)
    if isinstance(run, ByHand):
        time.sleep(draw.uniform(*AWAY_S))
        run.revive(node)
    return node


def a_node(run: Training, node: str, draw: random.Random) -> str:
    lose(run, node)
    away_s = draw.uniform(*AWAY_S)
    time.sleep(away_s)
    run.nodes.boot(node)
    run.revive(node)
    return f"{node}, {away_s:.0f} s"


def lose(run: Training, node: str) -> None:
    run.nodes.crash(node)
    if isinstance(run, ByHand):
        run.gone(node)


def second_node(run: Training, node: str, draw: random.Random) -> str:
    """It comes back when the run is seen to go on without it; the rendezvous is on the first."""
    second = run.nodes.names[1]
    lose(run, second)
    return second


def link(seconds: float) -> Does:
    def cut(run: Training, node: str, draw: random.Random) -> str:
        run.nodes.cut(node)
        time.sleep(seconds)
        run.nodes.mend(node)
        return node

    return cut


def disk_full(run: Training, node: str, draw: random.Random) -> str:
    filler = faults.fill(run.seen.parent)
    time.sleep(FULL_S)
    filler.unlink()
    return "the run folder's"


def corrupted(run: Training, node: str, draw: random.Random) -> str:
    """Nobody saves between the change and the death by which the change is met."""
    ranks = faults.ranks(run.nodes)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    file = faults.corrupt(run.seen)
    died = a_rank(run, node, draw)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGCONT)
    return f"{file.parent.name if file else 'none'}, then {died}"


def warned(run: Training, node: str, draw: random.Random) -> str:
    assert isinstance(run, InSlurm)
    faults.warn(run.slurm, run.number)
    return "the batch shell"


def requeued(run: Training, node: str, draw: random.Random) -> str:
    assert isinstance(run, InSlurm)
    faults.requeue(run.slurm, run.number)
    return "the job"


SHORT, CORRUPT, ELASTIC = f"link cut, {SHORT_S:.0f} s", "newest checkpoint corrupted, then a rank", "the second node"
COMMON: dict[str, Does] = {
    "kill -9 of a rank": a_rank,
    "kill -9 of torchrun's agent": an_agent,
    "kill -9 of all on a node": processes,
    "a node dies": a_node,
    SHORT: link(SHORT_S),
    f"link cut, {LONG_S:.0f} s": link(LONG_S),
    f"disk full, {FULL_S:.0f} s": disk_full,
    CORRUPT: corrupted,
}
KINDS: dict[str, dict[str, Does]] = {
    "slurm": COMMON | {"SIGUSR1 to the batch shell": warned, "scontrol requeue": requeued},
    "torchrun": COMMON,
    "elastic": {ELASTIC: second_node},
}
SHARES = {"slurm": 30, "torchrun": 24, "elastic": 5}  # of faults
LENGTHS = {"slurm": 10, "torchrun": 8, "elastic": 3}  # faults a run, at most
STEPS = {"slurm": 100, "torchrun": 125, "elastic": 600}  # a fault, so that the last one comes before the end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=56)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path, default=Path("profiling/results/fault_drill"))
    args = parser.parse_args()
    log.LOGGER.setLevel("ERROR")  # a checkpoint that is being deleted is no news here
    args.out.parent.mkdir(parents=True, exist_ok=True)
    file, said = args.out.with_suffix(".json"), {"seed": args.seed, "environment": environment()}
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    rows = [row for row in rows if row["series"] not in args.only]
    whole: dict[int, Path] = {}
    with tempfile.TemporaryDirectory(prefix="fault_drill_") as place:
        for series in args.only:
            count = max(1, round(args.faults * SHARES[series] / sum(SHARES[name] for name in args.only)))
            steps = STEPS[series] * LENGTHS[series]
            if steps not in whole:
                whole[steps] = undisturbed(steps, Path(place) / f"whole {steps}")
            draw = random.Random(f"{args.seed} {series}")
            for number, kinds in enumerate(deal(list(KINDS[series]), count, LENGTHS[series], draw), 1):
                folder = Path(place) / f"{series}{number}"
                folder.mkdir()
                tally = drill(series, number, kinds, steps, draw, folder, whole[steps])
                rows.append(asdict(tally) | said)
                file.write_text(json.dumps(rows, indent=1))
                args.out.with_suffix(".md").write_text(markdown(rows))
                print(json.dumps(asdict(tally), indent=1), file=sys.stderr)
    print(markdown(rows))
    return 0 if all(map(sound, rows)) else 1


def deal(kinds: Sequence[str], count: int, most: int, draw: random.Random) -> list[list[tuple[str, int]]]:
    """So many faults, each with the number of its node, for runs of about the same length.

    Kinds come round before one of them comes again, and then it is the other node's turn.
    """
    first = {kind: draw.randrange(2) for kind in kinds}
    dealt: list[tuple[str, int]] = []
    while len(dealt) < count:
        turn = len(dealt) // len(kinds)
        dealt += [(kind, (first[kind] + turn) % 2) for kind in draw.sample(kinds, len(kinds))]
    runs = math.ceil(count / most)
    cuts = [round(count * n / runs) for n in range(runs + 1)]
    return [dealt[begin:end] for begin, end in pairwise(cuts)]


def undisturbed(steps: int, folder: Path) -> Path:
    """The folder of a run of two ranks that nobody disturbs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command = [*launcher, "snell_dist", "train", "demo", *SETTINGS, f"train.steps={steps}", "--folder", str(folder)]
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=FINISH_S, capture_output=True)
    return folder


def drill(
    series: str,
    number: int,
    kinds: Sequence[tuple[str, int]],
    steps: int,
    draw: random.Random,
    place: Path,
    whole: Path,
) -> Tally:
    """Does these faults to a run, then lets it finish. `whole`: the run that nobody disturbed."""
    tally = Tally(series, number)
    with cluster(series, place, steps) as run:
        try:
            run.start()
            run.comes_to(1)
            for kind, node in kinds:
                run.comes_to(run.shown() + draw.randint(*BETWEEN))
                time.sleep(draw.uniform(0, POLL_S))
                hurt(run, series, kind, run.nodes.names[node], draw, tally)
            run.finish()
        except Lost as error:
            tally.failed = str(error)
        else:
            conclude(run, whole, tally)
        if not sound(asdict(tally)):
            kept = Path(tempfile.mkdtemp(prefix=f"fault_drill_{series}_"))
            shutil.copytree(run.seen, kept / "run", ignore=shutil.ignore_patterns("checkpoints"), dirs_exist_ok=True)
            shutil.copytree(place, kept / "place", ignore=shutil.ignore_patterns("disk", "munge*", "gpu*", "spool*"))
            print(f"{series} {number}: what it left is in {kept}", file=sys.stderr)
    return tally


@contextmanager
def cluster(series: str, place: Path, steps: int) -> Iterator[Training]:
    """Two nodes with a run that has not begun. With the block all of it ends."""
    with Nodes(2, place, prefix="dri", network=NETWORK) as nodes, faults.small_disk(nodes, place / "disk"):
        if series == "slurm":
            yield InSlurm(nodes, place / "disk", steps, place)
        else:
            yield ByHand(nodes, place / "disk", steps, place, "1:2" if series == "elastic" else "2")


def hurt(run: Training, series: str, kind: str, node: str, draw: random.Random, tally: Tally) -> None:
    """One fault, until the run is back. Lost where it does not come back."""
    saved = run.saved()
    at = time.time()
    fault = Fault(kind, "", run.shown(), max(saved[:-1] if kind == CORRUPT else saved, default=0))
    tally.faults.append(fault)
    print(f"{series} {tally.run}: {kind} after step {fault.step}", file=sys.stderr)
    fault.where = KINDS[series][kind](run, node, draw)
    mended = time.time()
    while not judge(fault, run.attempts(), at, mended):
        if time.time() > at + HANG_S:
            fault.hung = True
            raise Lost(f"not back within {HANG_S} s after: {kind} ({fault.where})")
        run.check()
        time.sleep(POLL_S)
    begun = [datetime.fromisoformat(one.began).timestamp() - at for one in keep.launches(run.seen)]
    fault.launched_s = max((s for s in begun if 0 < s < (fault.first_s or 0)), default=None)
    if kind == ELASTIC:
        run.comes_to(run.shown() + draw.randint(*BETWEEN))
        rejoin(run, fault)
    print(f"  {fault}", file=sys.stderr)


def rejoin(run: Training, fault: Fault) -> None:
    """The lost node comes back, and is in the run again. Lost where it is not."""
    attempts, began = len(run.attempts()), time.time()
    run.nodes.boot(fault.where)
    run.revive(fault.where)
    while not (new := [a for a in run.attempts()[attempts:] if a.steps]) or world_sizes(run)[-1] < 2:
        if time.time() > began + HANG_S:
            fault.hung = True
            raise Lost(f"{fault.where} is back, and not in the run within {HANG_S} s")
        run.check()
        time.sleep(POLL_S)
    fault.joined_s = new[-1].steps[0][0] - began


def judge(fault: Fault, attempts: Sequence[Attempt], at: float, mended: float) -> bool:
    """Whether the run is back; then the fault says how."""
    before, after = [a for a in attempts if a.began <= at], [a for a in attempts if a.began > at]
    done = max(a.last for a in before)
    new = [when for a in after for when, step in a.steps if step > done]
    if new:
        first = next(a for a in after if a.steps)
        fault.first_s, fault.back_s = first.steps[0][0] - at, new[0] - at
        fault.again, fault.attempts = done - first.resumed, len(after)
        starts = [a.resumed for a in after if a.steps]
        fault.lost = f"from {min(starts)}, saved were {fault.saved}" if min(starts) < fault.saved else None
        return True
    times = [at, *(when for when, _ in before[-1].steps if when > at)]
    if fault.kind == SHORT and times[-1] > mended + SETTLE_S:
        _, fault.back_s = max((later - one, later - at) for one, later in pairwise(times))
        return True
    return False


def world_sizes(run: Training) -> list[int]:
    return [attempt["world_size"] for attempt in run_folder.attempts(run.seen)]


def conclude(run: Training, whole: Path, tally: Tally) -> None:
    """Judges a run that has finished."""
    shown = steps_in(run.seen)
    if shown != list(range(1, run.steps + 1)):
        tally.metrics = f"{len(shown)} lines, {len(set(shown))} steps of {run.steps}"
    found, wanted = read_tensors(run.seen / ADAPTER), read_tensors(whole / ADAPTER)
    tally.equal = found.keys() == wanted.keys() and all(t.equal(wanted[name]) for name, t in found.items())
    mine, theirs = (last_loss(folder) for folder in (run.seen, whole))
    tally.difference = abs(mine - theirs) / abs(theirs)
    tally.orphans = run.orphans()
    launches = keep.launches(run.seen)
    tally.launches, tally.worlds = len(launches), world_sizes(run)
    tally.attempts = len(tally.worlds)
    if tally.attempts != len(run.attempts()):
        tally.counters.append(f"run.json has {tally.attempts} attempts, train.log {len(run.attempts())}")
    if not any(one.outcome == "complete" for one in launches):
        tally.counters.append("no launch is complete")
    if isinstance(run, InSlurm):
        tally.requeues = run.requeues()
        if launches[-1].restarts != tally.requeues:
            tally.counters.append(f"the last launch says {launches[-1].restarts} requeues, Slurm {tally.requeues}")


def last_loss(folder: Path) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["loss"]


def agrees(row: Mapping[str, Any]) -> bool:
    return bool(row["equal"]) or (row["series"] == "elastic" and (row["difference"] or 1) <= ROUNDING)


def sound(row: Mapping[str, Any]) -> bool:
    bad = [f for f in row["faults"] if f["lost"] or f["hung"]]
    return agrees(row) and not (bad or row["failed"] or row["metrics"] or row["orphans"] or row["counters"])


BY_KIND = ["series", "fault", "times", "**hung**", "**lost**"]
BY_KIND += ["launch", "most", "first step", "most", "back", "most", "again, most"]
BY_RUN = ["run", "faults", "attempts", "launches", "requeues"]
BY_RUN += ["**orphans**", "**metrics**", "**counters**", "**equal**"]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    kinds = [BY_KIND, ["---"] * 2 + ["---:"] * (len(BY_KIND) - 2)]
    for series in KINDS:
        for kind in KINDS[series]:
            found = [f for row in rows if row["series"] == series for f in row["faults"] if f["kind"] == kind]
            if found:
                bad = [f"**{sum(bool(f[what]) for f in found)}**" for what in ("hung", "lost")]
                times = [each for name in ("launched_s", "first_s", "back_s") for each in _seconds(found, name)]
                kinds.append([series, kind, str(len(found)), *bad, *times, str(max(f["again"] for f in found))])
                if series == "elastic":
                    joined = [str(len(found)), *[""] * 4, *_seconds(found, "joined_s")]
                    kinds.append([series, "it comes back", *joined, "", "", ""])
    runs = [BY_RUN, ["---"] + ["---:"] * (len(BY_RUN) - 1)]
    for row in rows:
        counts = [str(len(row["faults"])), str(row["attempts"]), str(row["launches"]), str(row["requeues"] or "")]
        verdict = "failed" if row["failed"] else "yes" if row["equal"] else f"loss, {row['difference']:.1e}"
        bad = [str(len(row["orphans"])), row["metrics"] or "whole", "; ".join(row["counters"]) or "right", verdict]
        runs.append([f"{row['series']} {row['run']}", *counts, *(f"**{each}**" for each in bad)])
    total = sum(len(row["faults"]) for row in rows)
    where = dict.fromkeys(where_run(row["environment"]) for row in rows)
    tables = ["\n".join(f"| {' | '.join(cells)} |" for cells in table) for table in (kinds, runs)]
    failed = [f"{row['series']} {row['run']}: {row['failed']}" for row in rows if row["failed"]]
    return "\n\n".join([*tables, *failed, f"{total} faults.", *where]) + "\n"


def _seconds(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Median and most."""
    known = [f[name] for f in found if f[name] is not None]
    return [f"{statistics.median(known):.1f} s", f"{max(known):.1f} s"] if known else ["", ""]


if __name__ == "__main__":
    sys.exit(main())
