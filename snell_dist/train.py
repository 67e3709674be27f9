"""Training: the loop, from the newest checkpoint to the end or to a request to stop."""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from snell_dist import checkpoint, dist, log, optim, run_folder
from snell_dist.audit import entries
from snell_dist.build import Built
from snell_dist.config import UserError
from snell_dist.data import micro_batches, steps_per_epoch
from snell_dist.memory.record import PeakMemory, process_mib
from snell_dist.methods import Place
from snell_dist.observe import Moment, Observer, StepTimer
from snell_dist.run_config import Run


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
    start = checkpoint.resume(folder, built.engine)
    if start:
        log.info(f"resumed after step {start} of {config.train.steps}")
    timer, summary = StepTimer(device), dict[str, Any]()
    with ExitStack() as stack:
        stop = stack.enter_context(dist.StopRequest().listening())
        observers = _observers(config, folder, built, start)
        for observer in observers:
            stack.callback(observer.on_end, summary)
        done = loop(config, folder, built, start, observers, timer, stop)
    if done < config.train.steps:
        return Outcome(folder, interrupted=True, summary=summary)
    summary |= _results(config, built, timer)
    _finish(config, folder, built, summary)
    return Outcome(folder, interrupted=False, summary=summary)


def loop(
    config: Run,
    folder: Path,
    built: Built,
    start: int,
    observers: list[Observer],
    timer: StepTimer,
    stop: dist.StopRequest,
) -> int:
    """The training steps from `start` on. Returns the number of steps done."""
    cfg, engine, task, splits = config.train, built.engine, built.task, built.splits
    epoch = steps_per_epoch(splits.train, config.data.batch_size)
    engine.model.train()
    done = start
    for step in range(start, cfg.steps):
        # one step: gradients of the mean loss over the whole batch, one update
        timer.start()
        dist.seed_everything(cfg.seed, step, dist.rank())
        loss = task.step(engine, micro_batches(splits.train, config.data, step, cfg.seed))
        if step == start:
            check_gradients(built)
        lr = optim.lr_at(config.optim, step, cfg.steps)
        grad_norm = engine.step(lr)
        task.after_step(engine.model)
        config.method.after_step(engine.model, Place(step, cfg.steps, epoch))
        engine.clear()
        timer.stop()

        # what is said, looked at, saved
        done, metrics = step + 1, {}
        last = done == cfg.steps
        if done % cfg.log_every == 0 or last:
            metrics = {"loss": dist.sum_over_ranks(loss).item(), "grad_norm": grad_norm.item(), "lr": lr}
            metrics["process_mib"] = process_mib(engine.device)
            metrics["step_s"] = statistics.median(timer.drain()[-cfg.log_every :])
            check_finite(metrics["loss"], step)
        if cfg.eval_every and done % cfg.eval_every == 0:
            measured = task.evaluate(engine, splits.val, config.data.batch_size)
            metrics |= {f"val_{key}": value for key, value in measured.items()}
        for observer in observers:
            observer.on_step(Moment(step, metrics))
        stopping = stop.agreed(engine.device)
        if last or stopping or done % cfg.save_every == 0:
            checkpoint.save(folder, engine, done, cfg.keep)
        if stopping:
            break
    return done


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
        observers += [log.MetricsFile(folder / "metrics.jsonl", start), log.Progress(start, config.train.steps)]
    return observers


def _results(config: Run, built: Built, timer: StepTimer) -> dict[str, Any]:
    """The one look at the test images, and the run's figures."""
    splits, batch_size = built.splits, config.data.batch_size
    test = built.task.evaluate(built.engine, splits.test, batch_size)
    val = built.task.evaluate(built.engine, splits.val, batch_size)
    sizes = entries(built.engine.model)
    seconds = timer.drain()
    return {
        "method": config.method.name,
        "base": built.backbone.name,
        "base_weights": built.weights,
        "base_sha256": built.fingerprint,
        "protocol": "weights of the last step; test images looked at once",
        "trainable_parameters": sum(sizes[name] for name in built.trainable),
        "parameters": sum(sizes.values()),
        "test_accuracy": test["accuracy"],
        "test_images": len(splits.test),  # type: ignore[arg-type]
        "val_accuracy": val["accuracy"],
        "steps": config.train.steps,
        "median_step_s": statistics.median(seconds) if seconds else None,
    }


def _finish(config: Run, folder: Path, built: Built, summary: dict[str, Any]) -> None:
    if dist.rank() == 0:
        file, classes = folder / checkpoint.ADAPTER, built.splits.classes
        belongs = checkpoint.Belongs(built.backbone.name, built.fingerprint, config.method, classes)
        checkpoint.save_adapter(file, built.engine.model, built.saved, belongs)
        run_folder.write_summary(folder, summary)
    dist.barrier()
