"""Out of memory, explained: one page that says what asked for how much, where, and what would help.

Nothing is watched while all goes well. In a forward the failed call's own frames name the module. Backward has no such
frames but for what is recomputed, and the order in which gradients appear tells how far it had come. What the request
was for, and what would help, the plan says (`remedies`), in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
import yaml
from torch import nn

from snell_dist import dist, heartbeat, limits, log
from snell_dist.build import Built
from snell_dist.config import UserError, first_line
from snell_dist.exits import Exit
from snell_dist.files import write_atomic
from snell_dist.footprint import OUTSIDE, Phase
from snell_dist.memory import device, measure
from snell_dist.memory.gpus import UNITS, in_words
from snell_dist.memory.remedies import CONFIG, DIAGNOSIS, FAILURE, Change, Diagnosis, Failure
from snell_dist.memory.timeline import block_of
from snell_dist.run_config import Run

ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)")
PATIENCE_S = 120.0  # for the plan
LAUNCH = re.compile(r"RANK|WORLD_SIZE|LOCAL_\w+|GROUP_\w+|ROLE_\w+|MASTER_\w+|TORCHELASTIC_\w+")
EXPANDABLE = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"


class OutOfMemory(UserError):
    """A step does not fit; a page says why. Another attempt would end the same way."""

    status = Exit.OUT_OF_MEMORY


@contextmanager
def explained(config: Run, folder: Path, built: Built) -> Iterator[None]:
    """Within, running out of memory leaves a page in the run folder and on the terminal, and raises OutOfMemory."""
    failure = None
    try:
        yield
    except Exception as error:
        if not limits.ran_out(error):
            raise
        failure = look(error, config, built, folder)
        traceback.clear_frames(error.__traceback__)  # what they hold makes room for what follows
    if failure is not None:
        diagnosis, why = _diagnosed(config, failure)
        page = text(failure, diagnosis, why, folder)
        file = folder / f"oom_rank{failure.rank}.txt"
        with suppress(OSError):
            write_atomic(file, f"{page}\n")
        log.LOGGER.error(page)
        first = f"; try {' '.join(diagnosis.changes[0].overrides)}" if diagnosis and diagnosis.changes else ""
        raise OutOfMemory(f"out of memory in {_where(failure)}, see {file}{first}")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Within, as a configuration is built, running out of memory is said in one line: OutOfMemory."""
    failed = ""
    try:
        yield
    except Exception as error:
        if not limits.ran_out(error):
            raise
        failed = first_line(error)
        traceback.clear_frames(error.__traceback__)
    if failed:
        plan = f"snell plan {name} --gpus N --gpu-memory SIZE"
        raise OutOfMemory(f"{name}: out of memory before the first step ({failed}); {plan} says what fits")


def look(error: BaseException, config: Run, built: Built, folder: Path) -> Failure:
    """What can be told while the failed call's frames are still there."""
    engine, model = built.engine, built.engine.model
    doing, step = heartbeat.place()
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    in_backward = next((i for i, f in enumerate(frames) if f.f_code.co_name == "_engine_run_backward"), None)
    module = _at_work(frames[in_backward or 0 :], model)
    phase: Phase | None = None
    if in_backward is not None:
        phase = Phase.BACKWARD if module is None else Phase.RECOMPUTE
    elif doing == "forward" or (doing == "backward" and module):
        phase = Phase.FORWARD
    elif doing == "backward":
        phase = Phase.BACKWARD
    elif doing == "update":
        phase = Phase.STEP
    name = _reached(model) if phase == Phase.BACKWARD else module
    blocks = {own: address for address, own in built.backbone.blocks.items()}
    asked, rounding = asked_for(str(error))
    images = config.data.batch_size // dist.world_size()
    cuda = engine.device.type == "cuda"
    return Failure(
        message=first_line(error),
        rank=dist.rank(),
        ranks=dist.world_size(),
        ranks_per_node=dist.local_world_size(),
        host=dist.host(),
        device_type=engine.device.type,
        capability=torch.cuda.get_device_capability(engine.device) if cuda else None,
        place=heartbeat.PHASES.get(doing, "the run"),
        step=step,
        phase=phase,
        block=block_of(name, blocks) if name else OUTSIDE,
        module=name or "",
        kind=type(model.get_submodule(name)).__name__ if name else "",
        sure=phase != Phase.BACKWARD,
        asked=asked,
        rounding=rounding,
        images=images,
        micro_batch_size=images // config.data.accumulation(),
        eval_batch_size=config.data.eval_size(),
        held=measure.held_bytes(engine),
        gradients=sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        figures=device.figures(engine.device),
        process=limits.in_use(),
        limits=limits.limits(),
        snapshot=_snapshot(folder) if cuda else None,
    )


def asked_for(message: str) -> tuple[int | None, int]:
    """Bytes of the request, and by how much they may be rounded."""
    found = ASKED.search(message)
    if found is None:
        return None, 0
    unit = UNITS.get(found[2], 1)
    return round(float(found[1]) * unit), unit // 100


def text(failure: Failure, diagnosis: Diagnosis | None, why: str, folder: Path) -> str:
    """The page. why: where there is no diagnosis."""
    step = f", in step {failure.step}" if failure.step else ""
    rows = [("where", _where(failure) + ("" if failure.sure or not failure.module else _UNSURE))]
    asked = failure.message if failure.asked is None else in_words(failure.asked)
    rows.append(("asked for", asked + _kinds(failure, diagnosis)))
    held = f"weights and optimizer state {in_words(failure.held)}, gradients {in_words(failure.gradients)}"
    live = f"; by the plan {in_words(diagnosis.live)} in all" if diagnosis and diagnosis.live is not None else ""
    rows.append(("live", held + live))
    rows += _room(failure)
    if diagnosis:
        rows.append(("the plan", f"{in_words(diagnosis.peak_bytes)} at the peak, in {diagnosis.peak}"))
        rows.append(("", diagnosis.categories))
    else:
        rows.append(("the plan", why))
    if failure.snapshot:
        rows.append(("snapshot", f"{failure.snapshot}, to be opened at https://pytorch.org/memory_viz"))
    head = f"Out of memory: rank {failure.rank} of {failure.ranks} on {failure.host}{step}"
    return "\n".join([head, "", *log.columns(rows), *_help(diagnosis, folder), *_hints(failure)])


_UNSURE = ", or a module before it: gradients have come so far"


def _where(failure: Failure) -> str:
    if failure.phase is None or failure.phase == Phase.STEP:
        return failure.place
    module = f", {failure.module} ({failure.kind})" if failure.module else ""
    return f"{failure.phase.value}{module}"


def _kinds(failure: Failure, diagnosis: Diagnosis | None) -> str:
    if diagnosis is None or failure.asked is None or failure.phase is None:
        return ""
    kinds = " or ".join(diagnosis.asked_for)
    return f" of {kinds}" if kinds else ", a size that the plan does not have there"


def _room(failure: Failure) -> list[tuple[str, str]]:
    found, figures = [], failure.figures
    if figures.allocated is not None and figures.total is not None:
        said = [f"{in_words(figures.allocated)} of tensors", f"{in_words(figures.reserved or 0)} reserved"]
        said += [f"{in_words(figures.process)} of this process"] if figures.process else []
        said += [f"{in_words(figures.used)} used by all"] if figures.used else []
        found.append(("the GPU", f"{', '.join(said)}, {in_words(figures.total)} there are"))
    else:
        said = [f"{in_words(size)} {name}" for name, size in failure.process.items()]
        said += [f"{in_words(size)} allowed by {name}" for name, size in failure.limits.items()]
        found.append(("the process", ", ".join(said)))
    return found


def _help(diagnosis: Diagnosis | None, folder: Path) -> list[str]:
    if diagnosis is None or not diagnosis.changes:
        return []
    some = any(change.fits for change in diagnosis.changes)
    lines = ["", f"What would help, {'the cheapest' if some else 'what saves most'} first:"]
    rows = [_row(number, change) for number, change in enumerate(diagnosis.changes, 1)]
    lines += [f"  {line}" for line in log.columns(rows, right=(0,))]
    if any(change.resumes for change in diagnosis.changes):
        again = f"--resume --folder {folder} and the change"
        lines.append(f"To go on from the last checkpoint: the same command with {again}.")
    return lines


def _row(number: int, change: Change) -> tuple[str, ...]:
    return (
        str(number),
        " ".join(change.overrides),
        f"saves {in_words(change.saves)} of the peak",
        "fits" if change.fits else "",
        "; ".join(filter(None, [change.costs, "" if change.resumes else "a new run"])),
    )


def _hints(failure: Failure) -> list[str]:
    found, loose = [], failure.figures.fragmentation
    if loose is not None and failure.asked is not None and loose >= failure.asked:
        found.append(f"{in_words(loose)} are reserved and of no tensor: {EXPANDABLE} in the environment may be enough.")
    if failure.place == heartbeat.PHASES["evaluate"] and failure.eval_batch_size > 1:
        smaller = failure.eval_batch_size // 2
        found.append(f"data.eval_batch_size={smaller} evaluates half as many images at a time, to the same result.")
    return found


def _at_work(frames: list[FrameType], model: nn.Module) -> str | None:
    """The innermost module whose method is among the frames; None where there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    for frame in reversed(frames):
        name = names.get(id(frame.f_locals.get("self")))
        if name:
            return name
    return None


def _reached(model: nn.Module) -> str | None:
    """Where backward is: it goes from the last module to the first, and leaves gradients.

    None where it has left none yet, or an engine keeps them elsewhere, and where they are all there.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    missing = [name for name, p in trained if p.grad is None]
    if not missing or len(missing) == len(trained):
        return None
    return missing[-1].rpartition(".")[0] or None


def _snapshot(folder: Path) -> str | None:
    written = device.snapshot(folder / f"oom_rank{dist.rank()}.pickle")
    return None if written is None else str(written)


def _diagnosed(config: Run, failure: Failure) -> tuple[Diagnosis | None, str]:
    """By a process of its own; None, and why, where it cannot."""
    with tempfile.TemporaryDirectory(prefix="snell-oom-") as place:
        folder = Path(place)
        (folder / CONFIG).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False))
        (folder / FAILURE).write_text(failure.as_json())
        alone = {name: value for name, value in os.environ.items() if not LAUNCH.fullmatch(name)}
        alone |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "snell_dist.memory.remedies", place]
        try:
            done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, f"could not be made: {error}"
        if done.returncode:
            return None, f"could not be made: {(done.stderr.strip().splitlines() or ['it was ended'])[-1]}"
        return Diagnosis.from_json((folder / DIAGNOSIS).read_text()), ""
