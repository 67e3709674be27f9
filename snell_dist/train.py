"""Training: the loop, from the newest checkpoint to the end or to a request to stop."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from snell_dist import adapter, dist, heartbeat, log, mistakes, optim, results, run_folder, tensor_files
from snell_dist.build import Built
from snell_dist.checkpoint import Checkpoints, Meta, newest
from snell_dist.config import UserError
from snell_dist.evaluate import Measured
from snell_dist.feed import Feed
from snell_dist.memory.measure import PeakMemory, process_mib
from snell_dist.methods import Place
from snell_dist.observers import Moment, Observer, StepTimer, trackers
from snell_dist.observers.telemetry import Telemetry
from snell_dist.run_config import Run
from snell_dist.selection import Selection


@dataclass(frozen=True)
class Outcome:
    """What a run left. `interrupted`: it was asked to stop, saved, and can be resumed.

    `folder` is None where that happened in the training of its base, before the run itself began.
    """

    folder: Path | None
    interrupted: bool
    summary: dict[str, Any]


def train(config: Run, folder: Path, built: Built, device: torch.device) -> Outcome:
    """Trains in a run folder, from its newest checkpoint if it has one, to the end or to a request to stop."""
    selection = Selection(config, folder, built)
    start = resume(config, folder, built, selection)
    timer, summary = StepTimer(device), dict[str, Any]()
    with ExitStack() as stack:
        stop = stack.enter_context(dist.StopRequest(folder / run_folder.STOP).listening())
        observers = _observers(config, folder, built, start)
        for observer in observers:
            stack.callback(observer.on_end, summary)
        done = loop(config, folder, built, start, selection, observers, timer, stop)
        late = heartbeat.straggler(heartbeat.read(folder)) if dist.rank() == 0 else None
        if late:
            log.warn(late)
        if done < built.steps:
            return Outcome(folder, interrupted=True, summary=summary)
        selection.restore()
        test = built.task.evaluate(built.engine, built.splits.test, config.data)
        val = None if built.splits.val_trains else built.task.evaluate(built.engine, built.splits.val, config.data)
        summary |= results.summary(config, built, test, val, selection.step, timer.drain())
    finish(config, folder, built, test, summary)
    return Outcome(folder, interrupted=False, summary=summary)


def resume(config: Run, folder: Path, built: Built, selection: Selection) -> int:
    """Takes up the newest checkpoint, whatever engine and number of ranks wrote it. Returns the steps done."""
    found = newest(folder)
    if found is None:
        return 0
    found.check(built.fingerprint, config.method.model_dump())
    built.engine.load_state(found)
    selection.load_state(found)
    written = f"{found.meta.engine['name']} on {found.meta.world_size}"
    log.info(f"resumed after step {found.meta.step} of {built.steps}, saved by {written}")
    return found.meta.step


def loop(
    config: Run,
    folder: Path,
    built: Built,
    start: int,
    selection: Selection,
    observers: list[Observer],
    timer: StepTimer,
    stop: dist.StopRequest,
) -> int:
    """The training steps from `start` on. Returns the number of steps done."""
    cfg, engine, task, epoch = config.train, built.engine, built.task, built.steps_per_epoch
    telemetry = Telemetry(engine.device)
    checkpoints = Checkpoints(folder, cfg.keep, cfg.save_in_background)
    watched = config.method.watched(engine.model)
    feed = Feed(built.splits.train, config.data, cfg.seed, start, built.steps)
    engine.model.train()
    done = start
    for step in range(start, built.steps):
        # one step: gradients of the mean loss over the whole batch, one update
        heartbeat.enter("data", step + 1)
        timer.start()
        dist.seed_everything(cfg.seed, step, dist.rank())
        loss = task.step(engine, feed.step())
        if step == start:
            check_gradients(built)
        gradients = {name: g for name, g in engine.gradients() if name in watched} if watched else {}
        heartbeat.enter("update")
        lr = optim.lr_at(config.optim, step, built.steps, epoch)
        grad_norm = engine.step(lr)
        task.after_step(engine)
        weights = dict(engine.weights(watched)) if watched else {}
        config.method.after_step(engine.model, Place(step, built.steps, epoch), weights, gradients)
        selection.after_step()
        timer.stop()

        # what is said, looked at, saved
        heartbeat.enter("agree")
        done, metrics = step + 1, {}
        last, stopping = done == built.steps, stop.agreed(engine.device)
        logs, saves = done % cfg.log_every == 0 or last, done % cfg.save_every == 0 or last or stopping
        heartbeat.enter("log")
        if logs or saves:  # nothing is saved before it is seen to be finite
            figures = {"loss": dist.sum_over_ranks(loss).item(), "grad_norm": grad_norm.item(), "lr": lr}
            check_finite(cfg.nonfinite, figures, step)
        if logs:
            metrics = figures | pace(timer.drain()[-cfg.log_every :], feed.waited_s(), config.data.batch_size)
            metrics |= {"process_mib": process_mib(engine.device), **telemetry.read()}
            metrics |= {} if checkpoints.last_s is None else {"save_s": checkpoints.last_s}
        if cfg.looks(done, epoch):
            metrics |= selection.look(done)
        for observer in observers:
            observer.on_step(Moment(step, metrics))
        if saves:
            heartbeat.enter("save")
            checkpoints.save(engine.state() | selection.state(), meta(config, built, done, lr))
        checkpoints.settle(wait=last or stopping)
        if stopping:
            break
    return done


def pace(seconds: list[float], waited_s: float, batch_size: int) -> dict[str, float]:
    """Of the last steps: median time, images a second over all ranks, and the share of time spent waiting for them."""
    whole = sum(seconds)
    return {
        "step_s": statistics.median(seconds),
        "images_per_s": batch_size * len(seconds) / whole,
        "data_wait": waited_s / whole,
    }


def check_gradients(built: Built) -> None:
    """After the first backward: every parameter that trains has a finite gradient, or the run is a mistake."""
    without, broken = [], []
    for name, gradient in built.engine.gradients():
        if gradient is None:
            without.append(name)
        elif not gradient.isfinite().all():
            broken.append(name)
    for names, what in ((without, "get no gradient"), (broken, "have a gradient that is not finite")):
        if names:
            raise UserError(
                f"{len(names)} of {len(built.trainable)} trainable tensors {what}: {', '.join(names[:5])}, ..."
            )


def check_finite(policy: str, metrics: Mapping[str, float], step: int) -> None:
    """UserError, or a warning where such steps are left out."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics[name]):
            said = f"{name} is {metrics[name]} at step {step + 1}"
            if policy == "stop":
                advice = "lower optim.lr or set optim.clip_norm; train.nonfinite=skip leaves such steps out"
                raise UserError(f"{said}: {advice}; earlier checkpoints are kept")
            log.warn(f"{said}: the step was left out")


def meta(config: Run, built: Built, done: int, lr: float) -> Meta:
    """What a checkpoint after `done` steps says of itself."""
    epoch, batch = divmod(done, built.steps_per_epoch)
    belongs = belongs_to(config, built)
    return Meta(
        step=done, steps=built.steps, epoch=epoch, batch=batch, seed=config.train.seed, lr=lr,
        engine=config.engine.model_dump(), world_size=dist.world_size(), **asdict(belongs),
    )  # fmt: skip


def belongs_to(config: Run, built: Built) -> adapter.Belongs:
    return adapter.Belongs(
        built.backbone.name, built.fingerprint, config.method.model_dump(), list(built.splits.classes)
    )


def _observers(config: Run, folder: Path, built: Built, start: int) -> list[Observer]:
    observers: list[Observer] = [PeakMemory(built.engine, start)]
    if dist.rank() == 0:
        observers += [log.MetricsFile(folder / "metrics.jsonl", start), log.Progress(start, built.steps)]
        observers += trackers.make(config.train.track, folder, config.model_dump())
    return observers


def finish(config: Run, folder: Path, built: Built, test: Measured, summary: dict[str, Any]) -> None:
    """Writes what a complete run leaves; that it is complete, last."""
    weights = dict(built.engine.weights())
    if dist.rank() == 0:
        adapter.save(folder / adapter.ADAPTER, weights, belongs_to(config, built))
        said = {"label": test.label, "predicted": test.predicted, "confidence": test.confidence}
        tensor_files.write_tensors(folder / "test_predictions.safetensors", said, {})
        mistakes.save(folder, built.splits.test, test, built.splits.classes)
        run_folder.write_summary(folder, summary)
    dist.barrier()
