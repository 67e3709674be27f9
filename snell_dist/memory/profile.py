"""A real step beside its prediction: what was said, what is held, and by how much they differ.

Measured three ways: by the ledger, which tells categories and blocks apart; by the allocator's own count, which knows
nothing of either and sees what kernels take for themselves; and on a GPU by the driver's figure for the process. The
step is real, its images are not (`rehearsal`).
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from snell_dist import dist
from snell_dist.config import UserError
from snell_dist.engines import Job, Share
from snell_dist.files import write_atomic
from snell_dist.footprint import Category, Footprint
from snell_dist.memory import device as device_memory
from snell_dist.memory import rehearsal
from snell_dist.memory.device import Figures
from snell_dist.memory.measure import held_bytes, memory_profiler, peak_of
from snell_dist.memory.predict import Predictor
from snell_dist.memory.rehearsal import Rehearsal
from snell_dist.memory.standin import AMPERE
from snell_dist.run_config import Run

ROUNDS, ENOUGH_S = 3, 5.0  # timed steps, so many or for so long
SHORT_S = 0.5  # of a step


@dataclass(frozen=True)
class Profiled:
    """One process's. allocated: the allocator's peak, bytes; None where it does not tell."""

    predicted: Share
    measured: Footprint
    allocated: int | None
    device: dict[str, int]  # on a GPU: what it says of itself, bytes by name
    step_s: float
    recorded_s: float
    classes: int

    @property
    def error(self) -> float:
        """Signed, of the predicted peak, against the allocator's where there is one."""
        true = self.allocated or self.measured.peak_bytes
        return self.predicted.footprint.peak_bytes / true - 1


def profile(config: Run, device: torch.device) -> Profiled:
    """Of this rank, among the ranks there are. ConfigError where sections do not fit each other."""
    made = rehearsal.prepare(config, device, *_pieces(config))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else AMPERE
    return measured(made, predicted(config, device.type, capability), device)


def predicted(config: Run, device_type: str, capability: tuple[int, int] = AMPERE) -> Share:
    """Of one rank. capability: the GPU's."""
    size, passes = _pieces(config)
    predictor = Predictor(config, device_type, capability)
    whole = predictor.predict(size, passes).footprint
    ranks, per_node = dist.world_size(), dist.local_world_size()
    return config.engine.share(whole, Job(predictor.weights, predictor.blocks, ranks, per_node, passes, device_type))


def measured(made: Rehearsal, said: Share, device: torch.device) -> Profiled:
    """said: what was predicted."""
    made.step()
    step_s = _median_s(made.step, device)
    allocated, figures = _allocated(made, device)
    if step_s < SHORT_S:  # then what torch loads for a first recording would count for more than the recording
        rehearsal.record(made, device.type)
    begin = time.perf_counter()
    reading = rehearsal.record(made, device.type)
    recorded_s = (time.perf_counter() - begin) / 2
    found = reading.footprint()
    told = {name: size for name, size in asdict(figures).items() if size is not None}
    return Profiled(said, found, allocated, told, step_s, recorded_s, made.classes)


def remember(found: Profiled, name: str, config: Run, device: torch.device, file: Path) -> None:
    """Appends the errors to the history. UserError where it cannot be written."""
    said = {
        "config": name,
        "device": str(device),
        "backbone": f"{config.backbone.name}/{config.backbone.size}",
        "method": config.method.name,
        "engine": str(config.engine),
        "remat": config.remat.policy,
        "ranks": dist.world_size(),
        "predicted_bytes": found.predicted.footprint.peak_bytes,
        "recorded_bytes": found.measured.peak_bytes,
        "allocated_bytes": found.allocated,
        "error": found.error,
    }
    lines = file.read_text(encoding="utf-8") if file.exists() else ""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, f"{lines}{json.dumps(said)}\n")


def past(file: Path, config: Run, device_type: str) -> str | None:
    """How far earlier predictions were off: of the same kind, where there are any, or else of all."""
    if not file.exists():
        return None
    wanted = device_type, config.method.name, str(config.engine), config.remat.policy
    errors: dict[tuple[str, ...], list[float]] = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines():
            known = json.loads(line)
            kind = known["device"].partition(":")[0], known["method"], known["engine"], known["remat"]
            errors.setdefault(kind, []).append(float(known["error"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: is no history of predictions; take it away, or name another by --history") from None
    chosen = errors.get(wanted) or [error for each in errors.values() for error in each]
    if not chosen:
        return None
    devices = " and ".join(sorted({kind[0] for kind in errors}))
    what = "this method, engine and recomputation" if wanted in errors else f"other settings, on {devices},"
    return f"of {len(chosen)} earlier predictions of {what} the worst was off by {max(chosen, key=abs):+.2%} ({file})"


def compared(found: Profiled) -> dict[str, list[tuple[str, int, int]]]:
    """Predicted and measured bytes: of the peak and each category there, and of each block at the peak."""
    one, two = found.predicted.footprint, found.measured
    parts = [(c.value, one.peak.bytes.get(c, 0), two.peak.bytes.get(c, 0)) for c in Category]
    blocks = {**two.by_block, **one.by_block}
    by_block = [
        (name, sum(one.by_block.get(name, {}).values()), sum(two.by_block.get(name, {}).values())) for name in blocks
    ]
    return {"categories": [part for part in parts if part[1] or part[2]], "blocks": by_block}


def as_json(found: Profiled) -> dict[str, Any]:
    return {
        "rank": dist.rank(),
        "predicted": found.predicted.footprint.as_json(),
        "measured": found.measured.as_json(),
        "allocated_bytes": found.allocated,
        "device": found.device,
        "error": found.error,
        "step_s": found.step_s,
        "recorded_s": found.recorded_s,
        **compared(found),
    }


def _pieces(config: Run) -> tuple[int, int]:
    """Images of a micro-batch on one rank, and micro-batches of a step."""
    passes = config.data.accumulation()
    return config.data.batch_size // dist.world_size() // passes, passes


def _median_s(step: Callable[[], Any], device: torch.device) -> float:
    seconds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
        if sum(seconds) > ENOUGH_S:
            break
    return statistics.median(seconds)


def _allocated(made: Rehearsal, device: torch.device) -> tuple[int | None, Figures]:
    """The peak of one step by the allocator, and what the device says after it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
        made.step()
        said = device_memory.figures(device)
        return said.allocated_peak, said
    if device.type != "cpu" or dist.world_size() > 1:  # buckets are there before, and nobody counts them
        return None, Figures()
    held = held_bytes(made.engine)
    with memory_profiler() as profiler:
        made.step()
    return held + peak_of(profiler), Figures()
