"""One job: its processes, its run folder, the base weights that it starts from, and the training itself."""

from __future__ import annotations

from pathlib import Path

import torch

from snell_dist import dist, log, run_folder
from snell_dist.audit import audit
from snell_dist.build import build
from snell_dist.checkpoint import ADAPTER
from snell_dist.config import ConfigError, Loaded, UserError, load
from snell_dist.run_config import Run
from snell_dist.train import Outcome, train


def run(loaded: Loaded[Run], out: Path, resume: bool = False, folder: Path | None = None) -> Outcome:
    """Trains a configuration in a folder of its own under `out`, or in `folder`; with `resume`, continues there.

    Raises ConfigError (with the lines of the keys) or UserError before anything is written.
    """
    try:
        device = dist.pick_device(loaded.config.train.device)
    except ConfigError as error:
        raise loaded.locate(error) from None
    with dist.process_group(device):
        return _run(loaded, out, resume, folder, device, ())


def _run(
    loaded: Loaded[Run], out: Path, resume: bool, folder: Path | None, device: torch.device, above: tuple[str, ...]
) -> Outcome:
    config = loaded.config
    place = run_folder.choose(out, loaded.name, config, resume, folder) if dist.rank() == 0 else None
    place = dist.broadcast_object(place)
    if place is not None and run_folder.is_complete(place):
        log.info(f"{place} is complete, nothing to do")
        return Outcome(place, False, run_folder.read_summary(place))
    weights = config.backbone.weights
    if weights is not None and weights.startswith("config:"):
        base = _base(weights.removeprefix("config:"), out, device, (*above, loaded.name))
        if base is None:
            return Outcome(None, interrupted=True, summary={})
        weights = str(base / ADAPTER)
    try:
        built = build(config, weights, device)
    except ConfigError as error:
        raise loaded.locate(error) from None
    if dist.rank() == 0:
        place = place or run_folder.create(out, loaded.name, config, folder)
    place = dist.broadcast_object(place)
    with run_folder.lock(place), log.also_to(place / "train.log"):
        log.info(f"run folder {place}")
        log.info(audit(config, built, device))
        if dist.rank() == 0:
            run_folder.record_attempt(place, config.train.seed, str(device))
        return train(config, place, built, device)


def _base(name: str, out: Path, device: torch.device, above: tuple[str, ...]) -> Path | None:
    """The complete run of the configuration that makes the base weights, trained first where there is none.

    None where that training was interrupted.
    """
    base = load(name, [], Run)
    if base.name in above:
        raise UserError(f"backbone.weights = 'config:{name}': the configurations start from each other in a circle")
    place = run_folder.newest(out, base.name, base.config) if dist.rank() == 0 else None
    place = dist.broadcast_object(place)
    if place is None or not run_folder.is_complete(place):
        log.info(f"the base {name} is not trained yet: training it first")
        outcome = _run(base, out, place is not None, place, device, above)
        return None if outcome.interrupted else outcome.folder
    return place
