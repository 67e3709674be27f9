"""Training: the loop, from the newest checkpoint to the end or to a request to stop."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snell_dist import checkpoint, dist, log, mistakes, optim, results, run_folder
from snell_dist.build import Built
from snell_dist.config import UserError
from snell_dist.evaluate import Measured
from snell_dist.feed import Feed
from snell_dist.memory.record import PeakMemory, process_mib
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
    start, state = checkpoint.newest(folder)
    if start:
        built.engine.load_state(state)
        selection.load_state(state)
        log.info(f"resumed after step {start} of {built.steps}")
    timer, summary = StepTimer(device), dict[str, Any]()
    with ExitStack() as stack:
        stop = stack.enter_context(dist.StopRequest().listening())
        observers = _observers(config, folder, built, start)
        for observer in observers:
            stack.callback(observer.on_end, summary)
        done = loop(config, folder, built, start, selection, observers, timer, stop)
        if done < built.steps:
            return Outcome(folder, interrupted=True, summary=summary)
        selection.restore()
        test = built.task.evaluate(built.engine, built.splits.test, config.data)
        val = None if built.splits.val_trains else built.task.evaluate(built.engine, built.splits.val, config.data)
        summary |= results.summary(config, built, test, val, selection.step, timer.drain())
    _finish(config, folder, built, test, summary)
    return Outcome(folder, interrupted=False, summary=summary)


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
    feed = Feed(built.splits.train, config.data, cfg.seed, start, built.steps)
    engine.model.train()
    done = start
    for step in range(start, built.steps):
        # one step: gradients of the mean loss over the whole batch, one update
        timer.start()
        dist.seed_everything(cfg.seed, step, dist.rank())
        loss = task.step(engine, feed.step())
        if step == start:
            check_gradients(built)
        lr = optim.lr_at(config.optim, step, built.steps, epoch)
        grad_norm = engine.step(lr)
        task.after_step(engine.model)
        config.method.after_step(engine.model, Place(step, built.steps, epoch))
        engine.clear()
        selection.after_step()
        timer.stop()

        # what is said, looked at, saved
        done, metrics = step + 1, {}
        last = done == built.steps
        if done % cfg.log_every == 0 or last:
            metrics = {"loss": dist.sum_over_ranks(loss).item(), "grad_norm": grad_norm.item(), "lr": lr}
            metrics |= pace(timer.drain()[-cfg.log_every :], feed.waited_s(), config.data.batch_size)
            metrics |= {"process_mib": process_mib(engine.device), **telemetry.read()}
            check_finite(metrics["loss"], step)
        if cfg.looks(done, epoch):
            metrics |= selection.look(done)
        for observer in observers:
            observer.on_step(Moment(step, metrics))
        stopping = stop.agreed(engine.device)
        if last or stopping or done % cfg.save_every == 0:
            checkpoint.save(folder, engine.state() | selection.state(), done, cfg.keep)
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
    parameters = dict(built.engine.model.named_parameters())
    gradients = {name: parameters[name].grad for name in built.trainable}
    without = [name for name, gradient in gradients.items() if gradient is None]
    broken = [name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()]
    for names, what in ((without, "get no gradient"), (broken, "have a gradient that is not finite")):
        if names:
            raise UserError(
                f"{len(names)} of {len(built.trainable)} trainable tensors {what}: {', '.join(names[:5])}, ..."
            )


def check_finite(loss: float, step: int) -> None:
    if loss != loss or loss in (float("inf"), float("-inf")):
        advice = "lower optim.lr or set optim.clip_norm; earlier checkpoints are kept"
        raise UserError(f"the loss is {loss} at step {step + 1}: {advice}")


def _observers(config: Run, folder: Path, built: Built, start: int) -> list[Observer]:
    observers: list[Observer] = [PeakMemory(built.engine, start)]
    if dist.rank() == 0:
        observers += [log.MetricsFile(folder / "metrics.jsonl", start), log.Progress(start, built.steps)]
        observers += trackers.make(config.train.track, folder, config.model_dump())
    return observers


def _finish(config: Run, folder: Path, built: Built, test: Measured, summary: dict[str, Any]) -> None:
    if dist.rank() == 0:
        file, classes = folder / checkpoint.ADAPTER, built.splits.classes
        belongs = checkpoint.Belongs(built.backbone.name, built.fingerprint, config.method, classes)
        checkpoint.save_adapter(file, built.engine.model, built.saved, belongs)
        said = {"label": test.label, "predicted": test.predicted, "confidence": test.confidence}
        checkpoint.write_tensors(folder / "test_predictions.safetensors", said, {})
        mistakes.save(folder, built.splits.test, test, classes)
        run_folder.write_summary(folder, summary)
    dist.barrier()
