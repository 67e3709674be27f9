"""A few training steps under each of several settings, in one group of processes, written down to be compared.

    torchrun --nproc-per-node=2 -m snell_dist.doctor.trace PLAN.json

Without torchrun one process makes the same steps, with as many micro-batches as there are ranks and pieces.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snell_dist import dist, log, meeting, optim
from snell_dist.build import Built, build
from snell_dist.checkpoint import Checkpoints, newest
from snell_dist.config import UserError, load
from snell_dist.feed import Feed
from snell_dist.files import write_atomic
from snell_dist.memory.measure import Touched
from snell_dist.methods import Place
from snell_dist.run_config import Run
from snell_dist.tensor_files import write_tensors
from snell_dist.train import meta

FLUSHES = 8  # small collectives, after which gloo's threads hold no large buffer


@dataclass(frozen=True)
class Case:
    """Overrides of the configuration, and a name that can be a file's.

    resume: a folder whose newest checkpoint the case goes on from; save: how many steps are done when it leaves one,
    in the folder OUT/<name>; held: measure, after one step, what a forward leaves in memory for its backward.
    """

    name: str
    overrides: list[str]
    resume: str | None = None
    save: int | None = None
    held: bool = False


@dataclass(frozen=True)
class Plan:
    config: str
    cases: list[Case]
    steps: int
    device: str
    out: Path

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self) | {"out": str(self.out)}), encoding="utf-8")

    @staticmethod
    def read(file: Path) -> Plan:
        said = json.loads(file.read_text())
        return Plan(**said | {"cases": [Case(**case) for case in said["cases"]], "out": Path(said["out"])})

    def left(self) -> list[Case]:
        """Those of which nothing is written yet."""
        return [case for case in self.cases if not (self.out / f"{case.name}.json").exists()]


@dataclass(frozen=True)
class Trace:
    """What a case did; its trained tensors lie beside it.

    `refused`: why it could not begin. `died`: how its processes ended, said by who watched them.
    """

    name: str
    refused: str | None = None
    died: str | None = None
    losses: list[float] | None = None
    norms: list[float] | None = None
    without_gradient: list[str] | None = None
    frozen_moved: bool | None = None
    held_bytes: int | None = None
    seconds: float = 0.0

    def write(self, out: Path) -> None:
        write_atomic(out / f"{self.name}.json", json.dumps(asdict(self)))

    @staticmethod
    def read(out: Path, name: str) -> Trace:
        return Trace(**json.loads((out / f"{name}.json").read_text()))


def follow(plan: Plan) -> None:
    """Runs every case; rank 0 writes OUT/<case>.json and .safetensors."""
    device = dist.pick_device(plan.device)
    with meeting.process_group(device):
        for case in dist.broadcast_object(plan.left()):
            begin = time.perf_counter()
            try:
                config = quiet(load(plan.config, case.overrides, Run).config)
                said, weights = steps(config, build(config, config.backbone.weights, device), plan, case)
            except UserError as error:
                said, weights = {"refused": str(error).splitlines()[0]}, {}
            trace = Trace(case.name, seconds=time.perf_counter() - begin, **said)
            if dist.rank() == 0:
                write_tensors(plan.out / f"{case.name}.safetensors", weights, {})
                trace.write(plan.out)
            dist.barrier()


def steps(config: Run, built: Built, plan: Plan, case: Case) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The loop's steps without what surrounds them."""
    engine, frozen, start = built.engine, digest(built), 0
    if case.resume is not None:
        found = newest(Path(case.resume))
        assert found is not None, f"{case.resume} has no checkpoint"
        engine.load_state(found)
        start = found.meta.step
    end = start + 1 if case.held else plan.steps
    feed = Feed(built.splits.train, config.data, config.train.seed, start, end)
    watched = config.method.watched(engine.model)
    losses, norms, without = [], [], []
    engine.model.train()
    for step in range(start, end):
        dist.seed_everything(config.train.seed, step, dist.rank())
        loss = built.task.step(engine, feed.step())
        gradients = {}
        for name, gradient in engine.gradients() if step == start or watched else ():
            if gradient is None:
                without.append(name)
            elif name in watched:
                gradients[name] = gradient.clone()
        norm = engine.step(optim.lr_at(config.optim, step, built.steps, built.steps_per_epoch))
        built.task.after_step(engine)
        weights = dict(engine.weights(watched)) if watched else {}
        config.method.after_step(engine.model, Place(step, built.steps, built.steps_per_epoch), weights, gradients)
        losses.append(dist.sum_over_ranks(loss).item())
        norms.append(norm.item())
        if step + 1 == case.save:
            lr = optim.lr_at(config.optim, step, built.steps, built.steps_per_epoch)
            Checkpoints(plan.out / case.name, keep=1).save(engine.state(), meta(config, built, step + 1, lr))
    moved = dist.gather_objects(digest(built) != frozen)
    held = held_by_forward(built, config) if case.held else None
    said = {
        "held_bytes": held,
        "losses": losses,
        "norms": norms,
        "without_gradient": without,
        "frozen_moved": any(moved),
    }
    return said, {name: tensor.detach().cpu().clone() for name, tensor in engine.weights()}


def held_by_forward(built: Built, config: Run) -> int:
    """Bytes that a forward of one micro-batch leaves on this rank for its backward."""
    batches = built.engine.accumulate(Feed(built.splits.train, config.data, 0, 0, 1).step())
    images = next(batches).images
    with Touched() as touched:
        outputs = built.engine.forward(images)
    for _ in range(FLUSHES):
        dist.sum_over_ranks(torch.zeros(1))
    held = touched.living_bytes(but=[*(tensor for _, tensor in built.engine.held()), images])
    del outputs
    return held


def digest(built: Built) -> str:
    """SHA-256 of this rank's part of the frozen parameters."""
    found = hashlib.sha256()
    for name, tensor in built.engine.frozen():
        found.update(name.encode())
        found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def quiet(config: Run) -> Run:
    """Without what each rank draws for itself, a base that would be trained first, and epochs of hardly moving."""
    off: dict[str, dict[str, Any]] = {
        "method": {"dropout": 0.0, "drop_path": 0.0},
        "backbone": {"drop_path": 0.0, "templates": getattr(config.backbone, "templates", [])[:1]},
        "task": {"mixup": 0.0, "cutmix": 0.0},
        "optim": {"warmup_epochs": 0},
    }
    if (config.backbone.weights or "").startswith("config:"):
        off["backbone"]["weights"] = None
    parts = {}
    for section, fields in off.items():
        had = getattr(config, section)
        parts[section] = had.model_copy(update={key: value for key, value in fields.items() if hasattr(had, key)})
    return config.model_copy(update=parts)


if __name__ == "__main__":
    faulthandler.register(signal.SIGTERM, all_threads=False, chain=True)  # where it hung, when it is ended for that
    log.set_up()
    log.LOGGER.setLevel("WARNING")
    follow(Plan.read(Path(sys.argv[1])))
    dist.leave(0)
