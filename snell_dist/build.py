"""From a configuration to an engine that can train: the wrap order, one line each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from snell_dist import dist, methods, optim, precision, remat
from snell_dist.anatomy import Backbone, fingerprint
from snell_dist.config import ConfigError, Problem, UserError
from snell_dist.data import Splits
from snell_dist.engines import Engine, Work
from snell_dist.feed import Feed, steps_per_epoch
from snell_dist.inventory import Entry, inventory
from snell_dist.run_config import Run
from snell_dist.start import Start
from snell_dist.tasks import Task


@dataclass(frozen=True)
class Built:
    weights: str | None  # where the backbone's came from
    fingerprint: str  # of those weights
    splits: Splits
    steps_per_epoch: int
    steps: int
    backbone: Backbone
    trainable: list[str]
    inventory: dict[str, Entry]
    task: Task
    engine: Engine


def build(config: Run, weights: str | None, device: torch.device) -> Built:
    """`weights` stands for `backbone.weights`, which may name a configuration instead of a file.

    Raises ConfigError where sections do not fit each other, UserError where files are missing.
    """
    accumulation = config.data.accumulation()  # complains early
    dist.seed_everything(config.train.seed)
    splits = config.data.load(config.protocol.all_labelled)
    epoch = steps_per_epoch(splits.train, config.data.batch_size)
    start = Start(shared=config.engine.shards and config.backbone.head != "zeroshot")
    backbone, identity = _begun(config, weights, splits, start)
    _fit(splits, backbone)
    task = config.task.prepare(backbone, splits)
    with start.building():
        config.method.inject(backbone)
    trainable = config.method.trainable(backbone)
    methods.freeze_all_but(backbone.model, trainable)
    if start.reads:
        config.method.calibrate(backbone.model, _losses(config, backbone, task, splits, device))
    precision.apply(config.precision, backbone.model, trainable)
    entries = inventory(backbone.model, trainable)
    remat.apply(config.remat, backbone.block_modules)
    engine = config.engine.prepare(
        Work(
            model=backbone.model,
            fill=start.fill,
            blocks={name: backbone.model.get_submodule(name) for name in backbone.blocks.values()},
            remembered=list(methods.remembered(backbone.model)),
            make_optimizer=functools.partial(optim.make_optimizer, config.optim),
            optim=config.optim,
            precision=config.precision,
            device=device,
            micro_batch_size=config.data.batch_size // (dist.world_size() * accumulation),
            accumulation=accumulation,
            skip_nonfinite=config.train.nonfinite == "skip",
        )
    )
    steps = config.train.total_steps(epoch)
    return Built(weights, identity, splits, epoch, steps, backbone, trainable, entries, task, engine)


def _begun(config: Run, weights: str | None, splits: Splits, start: Start) -> tuple[Backbone, str]:
    """The model, and the fingerprint of its weights; without numbers on ranks that do not read."""
    said, problem = {"weights": weights} if start.reads else {"weights": None, "head": "new"}, None
    try:
        with start.building():
            backbone = config.task.build(config.backbone.model_copy(update=said), splits.classes)
    except UserError as error:
        problem = error
    start.agree(problem)
    return backbone, start.told(fingerprint(backbone.model, backbone.head) if start.reads else None)


def _fit(splits: Splits, backbone: Backbone) -> None:
    if splits.image_shape != backbone.image_shape:
        shapes = f"{backbone.image_shape}, the data gives {splits.image_shape}"
        message = f"the model takes images of (channels, height, width) {shapes}"
        raise ConfigError(Problem("backbone.image_size", message))


def _losses(
    config: Run, backbone: Backbone, task: Task, splits: Splits, device: torch.device
) -> Iterator[Callable[[], Tensor]]:
    """Calls for the losses of the first micro-batches, the same on every rank; on the model before it is wrapped."""
    wanted = config.method.calibration()
    if wanted:
        backbone.model.to(device)
    feed = Feed(splits.train, config.data, seed=0, start=0, stop=wanted, shared=True)
    batches = (batch for _ in range(wanted) for batch in feed.step())
    for batch in islice(batches, wanted):
        yield functools.partial(task.loss, backbone.model, batch.to(device))
