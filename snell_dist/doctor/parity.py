"""The same few steps in one process and under every engine: are they the same numbers?

    snell doctor parity mine.yaml --processes 2 --engines ddp fsdp zero3

One process makes each step from as many micro-batches as the group makes together, so that both add the same
gradients. Two summands have one order: there losses and weights must be equal to the bit. Of more, and where gradients
are clipped by a norm that each engine adds up in its own order, results differ by rounding, which AdamW turns into
steps of its learning rate wherever a gradient is nearly zero. No fixed limit fits all models then, so it is measured:
what rounding alone does to one process that takes finer micro-batches, and a margin.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snell_dist import log
from snell_dist.config import UserError, load, nearest
from snell_dist.doctor.trace import Case, Plan, Trace, quiet
from snell_dist.run_config import Run
from snell_dist.tensor_files import read_tensors

# A small model stays gathered by DeepSpeed's own thresholds, which would prove nothing.
KEYS = "param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"
SHARDED = f"engine.deepspeed_extra={{zero_optimization: {{{', '.join(f'stage3_{key}: 0' for key in KEYS)}}}}}"
ENGINES = {
    "ddp": ["engine.name=ddp"],
    "fsdp": ["engine.name=fsdp"],
    **{f"zero{stage}": ["engine.name=zero", f"engine.stage={stage}"] for stage in range(3)},
    "zero3": ["engine.name=zero", "engine.stage=3", SHARDED],
}
POLICIES = "none", "block"
ONE, FINER = "one process", "one process, finer"
SMALL = ["backbone.weights=null", "backbone.width=16", "backbone.depth=2", "backbone.heads=2"]

LEAST = 1e-6  # relative, of losses and norms; absolute, of weights: their rounding alone
MARGIN = 10  # over what rounding was seen to do
GRACE_S = 40  # for torchrun to end its processes
PATIENCE_S = 0.2  # between looks at what is done
TRACE, LAUNCHER_LOG = "snell_dist.doctor.trace", "launcher.log"
LINES = 8  # of a log that are repeated
LAUNCHER = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+")
FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")


@dataclass(frozen=True)
class Setting:
    """What is compared: `config` is quiet already. `source` and `overrides` say it again to other processes."""

    source: str
    overrides: list[str]
    config: Run
    device: str
    processes: int
    steps: int
    engines: list[str]

    @property
    def micro_batch_size(self) -> int:
        return self.config.data.micro_batch_size or self.config.data.batch_size // self.processes

    def to_the_bit(self, engine: str) -> bool:
        """Whether nothing is added in another order than in one process."""
        data, clips = self.config.data, self.config.optim.clip_norm is not None
        apart = self.config.task.name == "classify"  # images know nothing of each other
        one_order = self.device == "cpu" and apart and data.batch_size <= 2 * self.micro_batch_size
        return one_order and (engine == "ddp" or not clips)

    def alone(self) -> list[Case]:
        """The cases of one process."""
        sizes = {ONE: self.micro_batch_size}
        if not all(map(self.to_the_bit, self.engines)):
            sizes[FINER] = finer(self.micro_batch_size, self.config.data.batch_size)
        plain = [*self.overrides, *ENGINES["ddp"], "remat.policy=none"]
        return [Case(name, [*plain, f"data.micro_batch_size={size}"]) for name, size in sizes.items()]

    def together(self) -> list[Case]:
        return [
            Case(case(engine, policy), [*self.overrides, *ENGINES[engine], f"remat.policy={policy}"])
            for engine in self.engines
            for policy in POLICIES
        ]


def case(engine: str, policy: str) -> str:
    return f"{engine}, remat {policy}"


def finer(micro: int, batch: int) -> int:
    """Another size of micro-batches for the same batch."""
    return next((size for size in range(micro // 2, 0, -1) if micro % size == 0), batch)


@dataclass(frozen=True)
class Difference:
    """Largest over steps: of the loss and the gradient norm, relative. Of any trained number, absolute."""

    loss: float
    norm: float
    trained: float

    def within(self, limit: Difference) -> list[str]:
        """What is not."""
        return [
            f"{name} differs by {mine:.1e}, more than {most:.1e}"
            for (name, mine), most in zip(asdict(self).items(), asdict(limit).values(), strict=True)
            if not mine <= most
        ]


@dataclass(frozen=True)
class Told:
    """What one case left on disk."""

    trace: Trace
    trained: Mapping[str, Tensor]

    @staticmethod
    def read(out: Path, name: str) -> Told:
        trace = Trace.read(out, name)
        return Told(trace, {} if trace.losses is None else read_tensors(out / f"{name}.safetensors"))

    def differs(self, other: Told) -> Difference:
        return Difference(
            _largest(map(_relative, self.trace.losses or [], other.trace.losses or [])),
            _largest(map(_relative, self.trace.norms or [], other.trace.norms or [])),
            _largest(_between(self.trained, other.trained)),
        )

    def faults(self) -> list[str]:
        """What is wrong with it by itself."""
        found = []
        if self.trace.frozen_moved:
            found.append("frozen parameters have changed")
        if without := self.trace.without_gradient:
            found.append(f"{len(without)} trainable tensors get no gradient: {', '.join(without[:3])}")
        return found


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(other), 1e-30)


def _between(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[float]:
    for name in one.keys() | other.keys():
        same = name in one and name in other and one[name].shape == other[name].shape
        yield (one[name].double() - other[name].double()).abs().max().item() if same else math.inf


def _largest(found: Iterable[float]) -> float:
    """Infinite where nothing was compared, or anything is not finite."""
    values = list(found)
    return max(values) if values and all(map(math.isfinite, values)) else math.inf


@dataclass(frozen=True)
class Row:
    """One case. `same`: equal to the same engine without remat, to the bit. `wrong`: why it is red."""

    engine: str
    remat: str
    trace: Trace
    difference: Difference | None = None
    same: bool | None = None
    wrong: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        return "refused" if self.trace.refused else "red" if self.wrong else "green"

    @property
    def reasons(self) -> Sequence[str]:
        return [self.trace.refused] if self.trace.refused else self.wrong

    def cells(self) -> list[str]:
        trace, ran = self.trace, self.trace.losses is not None
        numbers = asdict(self.difference).values() if self.difference else [None] * 3
        return [
            self.engine,
            self.remat,
            *("-" if x is None else "0" if x == 0 else f"{x:.1e}" for x in numbers),
            ("MOVED" if trace.frozen_moved else "same") if ran else "-",
            ("LACK" if trace.without_gradient else "all") if ran else "-",
            "-" if self.same is None else "equal" if self.same else "NOT",
            f"{trace.seconds:.1f}",
            self.verdict,
        ]


HEADINGS = ["engine", "remat", "loss", "norm", "trained", "frozen", "grads", "no remat", "s", "verdict"]


@dataclass(frozen=True)
class Report:
    setting: Setting
    bits: list[str]  # engines that must be equal to the bit
    limits: tuple[Difference, Difference]  # theirs, and the others'
    rows: list[Row]

    @property
    def red(self) -> bool:
        return any(row.verdict == "red" for row in self.rows)

    def about(self) -> list[str]:
        """What was compared, and how much may differ."""
        setting = self.setting
        data, off = setting.config.data, turned_off(setting)
        pieces = data.batch_size // setting.micro_batch_size
        lines = [
            f"{setting.source}: {setting.steps} steps of {data.batch_size} images on {setting.device};"
            f" {setting.processes} processes against one that accumulates {pieces} micro-batches",
            *([f"turned off here: {', '.join(off)}"] if off else []),
        ]
        exact, loose = self.limits
        rest = [engine for engine in setting.engines if engine not in self.bits]
        if self.bits:
            lines.append(f"limits of {', '.join(self.bits)}: equal to the bit; norm {exact.norm:.1e}")
        if rest:
            allowed = f"loss {loose.loss:.1e}, norm {loose.norm:.1e}, trained {loose.trained:.1e}"
            why = f"{MARGIN} times what rounding does to one process with finer micro-batches, at least {LEAST:.0e}"
            lines.append(f"limits of {', '.join(rest)}: {allowed} ({why})")
        return lines

    def reasons(self) -> list[str]:
        said = [(f"{row.engine}, remat {row.remat}", row.verdict, why) for row in self.rows for why in row.reasons]
        return [f"{who}: {verdict}: {why}" for who, verdict, why in said]

    def text(self) -> str:
        table = [HEADINGS, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([*self.about(), "", *lines, *self._ends()])

    def show(self) -> None:
        """On a terminal with colours, else as plain columns."""
        if not sys.stdout.isatty():
            print(self.text())
            return
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        table = Table(*HEADINGS, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        colours = {"green": "green", "red": "bold red", "refused": "yellow"}
        for row in self.rows:
            *cells, verdict = row.cells()
            table.add_row(*cells, f"[{colours[verdict]}]{verdict}")
        console = Console(highlight=False)
        console.print(escape("\n".join(self.about())), "", table, escape("\n".join(self._ends())), sep="\n")

    def _ends(self) -> list[str]:
        return ["", *self.reasons()] if self.reasons() else []

    def json(self) -> str:
        rows = [asdict(row) | {"verdict": row.verdict} for row in self.rows]
        limits = dict(zip(("to_the_bit", "others"), map(asdict, self.limits), strict=True))
        setting = asdict(self.setting) | {"config": self.setting.config.model_dump()}
        said = setting | {"turned_off": turned_off(self.setting), "must_be_equal": self.bits, "limits": limits}
        return json.dumps(_finite(said | {"rows": rows, "green": not self.red}), indent=2)


def _finite(value: Any) -> Any:
    """JSON has no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def turned_off(setting: Setting) -> list[str]:
    """What of the user's configuration is not in force here."""
    had, has = load(setting.source, setting.overrides, Run).config.model_dump(), setting.config.model_dump()
    return [
        f"{section}.{key}={value}"
        for section, fields in had.items()
        for key, value in fields.items()
        if value != has[section][key]
    ]


def run(setting: Setting, out: Path, limit_s: float) -> Report:
    """Runs all cases in processes of their own and compares. UserError where one process cannot make the steps."""
    alone = Plan(setting.source, setting.alone(), setting.steps, setting.device, out)
    follow(alone, 0, limit_s)
    for each in alone.cases:
        trace = Trace.read(out, each.name)
        if trace.losses is None:
            raise UserError(f"doctor parity: {each.name}: {trace.refused or trace.died}")
    follow(Plan(setting.source, setting.together(), setting.steps, setting.device, out), setting.processes, limit_s)
    return compare(setting, out)


def choose(source: str | None, overrides: Sequence[str], processes: int, steps: int, engines: Sequence[str]) -> Setting:
    """Completes what a user asks for. UserError where that cannot be compared."""
    for engine in engines:
        if engine not in ENGINES:
            known = f"(allowed: {', '.join(ENGINES)})"
            raise UserError(f"doctor parity: --engines {engine}: unknown{nearest(engine, ENGINES)} {known}")
    if processes < 1 or steps < 1:
        raise UserError(f"doctor parity: --processes {processes} --steps {steps}: both must be at least 1")
    said = [*SMALL, f"data.batch_size={6 * processes}", *overrides] if source is None else list(overrides)
    source = source or "demo"
    config = quiet(load(source, said, Run).config)
    if config.data.batch_size % processes:
        batch = f"data.batch_size = {config.data.batch_size}"
        raise UserError(f"doctor parity: {batch}: must be a multiple of --processes {processes}")
    device = pick_device(config.train.device, processes)
    return Setting(source, said, config, device, processes, steps, list(engines) or list(ENGINES))


def pick_device(wish: str, processes: int) -> str:
    """Each process needs a GPU of its own; UserError where they are asked for and too few."""
    gpus = torch.cuda.device_count()
    if wish == "cuda" and gpus < processes:
        raise UserError(
            f"train.device = 'cuda': {gpus} GPUs for {processes} processes; say --processes {max(gpus, 1)}"
            " or train.device=cpu"
        )
    return "cuda" if wish in ("auto", "cuda") and gpus >= processes else "cpu"


def compare(setting: Setting, out: Path) -> Report:
    """The verdicts on what lies in `out`."""
    reference = Told.read(out, ONE)
    bits = [engine for engine in setting.engines if setting.to_the_bit(engine)]
    exact = loose = Difference(loss=0.0, norm=LEAST, trained=0.0)
    if len(bits) < len(setting.engines):
        seen = Told.read(out, FINER).differs(reference)
        loose = Difference(*(max(LEAST, MARGIN * value) for value in asdict(seen).values()))
    rows = [Row("alone", "none", reference.trace, wrong=tuple(reference.faults()))]
    for engine in setting.engines:
        for policy in POLICIES:
            rows.append(_row(setting, out, reference, engine, policy, exact if engine in bits else loose))
    return Report(setting, bits, (exact, loose), rows)


def _row(setting: Setting, out: Path, reference: Told, engine: str, policy: str, limit: Difference) -> Row:
    trace = Trace.read(out, case(engine, policy))
    if trace.losses is None:
        return Row(engine, policy, trace, wrong=(trace.died,) if trace.died else ())
    try:
        told, plain = (Told.read(out, case(engine, each)) for each in (policy, POLICIES[0]))
    except UserError as error:  # a damaged file
        return Row(engine, policy, trace, wrong=(str(error),))
    difference, same = told.differs(reference), None
    wrong = [*difference.within(limit), *told.faults()]
    if policy != POLICIES[0] and plain.trace.losses is not None:
        apart = told.differs(plain)
        same = apart.loss == apart.trained == 0
        if not same and setting.device == "cpu":
            wrong.append(f"remat changes the loss by {apart.loss:.1e}, what is trained by {apart.trained:.1e}")
    return Row(engine, policy, trace, difference, same, tuple(wrong))


# Processes: started, watched, ended. Their noise goes to files.


def follow(plan: Plan, processes: int, limit_s: float) -> None:
    """Every case of a plan gets a trace, under torchrun, or with 0 processes in one that knows of no group.

    Where a process dies, that is the case's trace, and the rest goes on in new processes. A hang, which is a case that
    takes longer than `limit_s`, ends it all.
    """
    plan.write(plan.out / "plan.json")
    while plan.left():
        logs = Path(tempfile.mkdtemp(dir=plan.out, prefix="logs"))
        status = _watch(plan, processes, limit_s, logs)
        left = [each.name for each in plan.left()]
        if not left:
            return
        how = f"no end after {limit_s:g} s" if status is None else _end(logs, status)
        Trace(left[0], died=f"{how}: {last_words(logs)}").write(plan.out)
        if status is None:
            for name in left[1:]:
                Trace(name, refused=f"not run, since {left[0]} had no end").write(plan.out)


def _watch(plan: Plan, processes: int, limit_s: float, logs: Path) -> int | None:
    """Runs what is left of a plan. Returns the exit status, None where it had to be ended."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher += ["--redirects=3", f"--log-dir={logs}"]
    words = [*(launcher if processes else []), "-m", TRACE, str(plan.out / "plan.json")]
    with (logs / LAUNCHER_LOG).open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *words], env=_environment(), stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        left, since = plan.left(), time.monotonic()
        while process.poll() is None and time.monotonic() - since < limit_s:
            time.sleep(PATIENCE_S)
            if len(plan.left()) < len(left):
                for each in left[: len(left) - len(plan.left())]:
                    log.info(f"{each.name}: {Trace.read(plan.out, each.name).seconds:.1f} s")
                left, since = plan.left(), time.monotonic()
        return process.poll()
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its own processes
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    """This one's, without any launcher's; as many threads in one process as in many, since they divide sums."""
    own = {key: value for key, value in os.environ.items() if not LAUNCHER.fullmatch(key)}
    quieter = {"PYTHONWARNINGS": "ignore::FutureWarning", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONFAULTHANDLER": "1"}
    return {"OMP_NUM_THREADS": "1"} | own | quieter


def _end(logs: Path, status: int) -> str:
    """Which process ended first, and how, as torchrun saw it."""
    found = FAILED.search((logs / LAUNCHER_LOG).read_text(errors="replace"))
    return f"process {found[2]} ended with status {found[1]}" if found else f"ended with status {status}"


def last_words(logs: Path) -> str:
    """The end of the log of the process that failed first; of all processes where none did."""
    launcher = logs / LAUNCHER_LOG
    found = FAILED.search(launcher.read_text(errors="replace"))
    each = sorted(logs.rglob(f"{found[2] if found else '*'}/stderr.log")) or [launcher]
    return "".join(f"\n    {line}" for file in each for line in _tail(file))


def _tail(file: Path) -> list[str]:
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    stacks = [i for i, line in enumerate(lines) if "most recent call first" in line]  # of faulthandler
    return lines[stacks[-1] :][:LINES] if stacks else lines[-LINES:]
