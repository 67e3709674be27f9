"""One job: its processes, its run folder, the base weights that it starts from, and the training itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from snell_dist import adapter, dist, hang, heartbeat, log, meeting, results, run_folder
from snell_dist.audit import audit
from snell_dist.build import Built, build
from snell_dist.config import ConfigError, Loaded, UserError, load
from snell_dist.memory import oom
from snell_dist.methods.full import Full
from snell_dist.observers import trackers
from snell_dist.preflight import Preflight
from snell_dist.run_config import Run
from snell_dist.train import Outcome, finish, train

LEAVING_S = 60.0  # until what is left of an earlier attempt has saved and ended


def run(loaded: Loaded[Run], out: Path, resume: run_folder.Resume = False, folder: Path | None = None) -> Outcome:
    """Trains a configuration in a folder of its own under `out`, or in `folder`; with `resume`, continues there.

    Raises ConfigError (with the lines of the keys) or UserError before anything is written.
    """
    try:
        device = dist.pick_device(loaded.config.train.device)
    except ConfigError as error:
        raise loaded.locate(error) from None
    check = Preflight(loaded.config, folder or out, device)
    # the heartbeat's thread ends a stuck run, and says why; where it cannot, the group's own time-out does
    with meeting.process_group(device, 4 * loaded.config.train.hang_timeout_s, check.meet):
        check.shake_hands()
        return _run(loaded, out, resume, folder, device, ())


def measure(loaded: Loaded[Run], out: Path, folder: Path | None, split: Literal["val", "test"]) -> dict[str, float]:
    """Accuracy and loss of the base as it is, or with what the run in `folder` trained; writes nothing of its own.

    Raises ConfigError or UserError as `run` does.
    """
    config = loaded.config
    if folder is None:  # the base alone: a method that adds nothing stands for none
        config = config.model_copy(update={"method": Full(name="full")})
    try:
        device = dist.pick_device(config.train.device)
        with meeting.process_group(device):
            built = build(config, _weights(config, out, device, (loaded.name,)), device)
            if folder is not None:
                mine = built.engine.weights()
                built.engine.load_weights(adapter.load(folder / adapter.ADAPTER, mine, built.fingerprint))
            return built.task.evaluate(built.engine, getattr(built.splits, split), config.data).metrics
    except ConfigError as error:
        raise loaded.locate(error) from None


def adopt(
    loaded: Loaded[Run], to: Path, out: Path, source: str, trained: Callable[[Built], Mapping[str, Tensor]]
) -> Outcome:
    """A complete run folder at `to`, of what was trained elsewhere, on a configuration's base and data.

    trained: what trains in the built model, and its method remembers, by name. UserError as `run` raises, and where
    the tensors are not those.
    """
    config = loaded.config
    try:
        device = dist.pick_device(config.train.device)
        with meeting.process_group(device):
            built = build(config, _weights(config, out, device, (loaded.name,)), device)
            built.engine.load_weights(adapter.fitting(source, trained(built), built.engine.weights()))
            test = built.task.evaluate(built.engine, built.splits.test, config.data)
            val = built.task.evaluate(built.engine, built.splits.val, config.data)
            summary = results.summary(config, built, test, val, chosen_step=0, seconds=[])
            summary["steps"] = None
            summary["protocol"] |= {"chosen": f"elsewhere: {source}", "steps": 0, "epochs": 0.0, "test_looks": 1}
            place = run_folder.create(out, loaded.name, config, to)
            run_folder.record_attempt(place, config, {"device": str(device), "imported": source})
            finish(config, place, built, test, summary)
            return Outcome(place, interrupted=False, summary=summary)
    except ConfigError as error:
        raise loaded.locate(error) from None


def _run(
    loaded: Loaded[Run],
    out: Path,
    resume: run_folder.Resume,
    folder: Path | None,
    device: torch.device,
    above: tuple[str, ...],
) -> Outcome:
    config = loaded.config
    trackers.check(config.train.track)
    place = dist.first_does(lambda: run_folder.choose(out, loaded.name, config, resume, folder))
    if place is not None and run_folder.is_complete(place):
        log.info(f"{place} is complete, nothing to do")
        return Outcome(place, False, run_folder.read_summary(place))
    if place is not None:
        config = _as_begun(config, place)
    try:
        weights = _weights(config, out, device, (*above, loaded.name))
    except Interrupted:
        return Outcome(None, interrupted=True, summary={})
    try:
        with oom.named(loaded.name):
            built = build(config, weights, device)
    except ConfigError as error:
        raise loaded.locate(error) from None
    place = dist.first_does(lambda: place or run_folder.create(out, loaded.name, config, folder))
    with run_folder.lock(place, patience_s=LEAVING_S if resume == "if any" else 0), log.also_to(place):
        log.info(f"run folder {place}")
        log.info(audit(config, built, device))
        hosts = list(dict.fromkeys(dist.gather_objects(dist.host())))
        said = {"seed": config.train.seed, "device": str(device), "hosts": hosts}
        said["micro_batch_size"] = config.data.batch_size // dist.world_size() // config.data.accumulation()
        attempt = dist.first_does(lambda: run_folder.record_attempt(place, config, said))
        beating = heartbeat.beating(place, attempt, built.steps, config.train.hang_timeout_s, hang.end)
        with beating, oom.explained(config, place, built):
            return train(config, place, built, device)


def _as_begun(config: Run, place: Path) -> Run:
    """On fewer ranks than at first a step takes more micro-batches, not larger ones: memory stays as it was."""
    first = run_folder.attempts(place)[:1]
    micro = first[0].get("micro_batch_size") if first else None
    share, rest = divmod(config.data.batch_size, dist.world_size())
    if config.data.micro_batch_size or not micro or rest or share <= micro or share % micro:
        return config
    log.info(f"{share // micro} micro-batches of {micro} images a rank make the batch of {config.data.batch_size}")
    return config.model_copy(update={"data": config.data.model_copy(update={"micro_batch_size": micro})})


class Interrupted(UserError):
    """The training of a base was asked to stop, and saved."""


def _weights(config: Run, out: Path, device: torch.device, above: tuple[str, ...]) -> str | None:
    """Where the base weights are; those of a configuration come from its complete run, trained first if need be."""
    said = config.backbone.weights
    if said is None or not said.startswith("config:"):
        return said
    name = said.removeprefix("config:")
    base = load(name, [], Run)
    if base.name in above:
        raise UserError(f"backbone.weights = 'config:{name}': the configurations start from each other in a circle")
    with run_folder.lock(out / base.name, patience_s=float("inf")):  # runs that start together share one base
        place = run_folder.newest(out, base.name, base.config) if dist.rank() == 0 else None
        place = dist.broadcast_object(place)
        if place is None or not run_folder.is_complete(place):
            log.info(f"the base {name} is not trained yet: training it first")
            outcome = _run(base, out, place is not None, place, device, above)
            if outcome.interrupted:
                raise Interrupted("interrupted in the training of the base; the same command goes on")
            place = outcome.folder
    assert place is not None
    return str(place / adapter.ADAPTER)
