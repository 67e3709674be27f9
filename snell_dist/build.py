"""From a configuration to an engine that can train: the wrap order, one line each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from snell_dist import dist, log, methods, optim, remat
from snell_dist.backbones import Backbone
from snell_dist.config import ConfigError, Problem
from snell_dist.data import Splits
from snell_dist.engines import Engine
from snell_dist.run_config import Run


@dataclass(frozen=True)
class Built:
    weights: str | None  # where the backbone's came from
    splits: Splits
    backbone: Backbone
    trainable: list[str]
    engine: Engine


def build(config: Run, weights: str | None, device: torch.device) -> Built:
    """`weights` stands for `backbone.weights`, which may name a configuration instead of a file.

    Raises ConfigError where sections do not fit each other, UserError where files are missing.
    """
    config.data.accumulation()  # complains early
    dist.seed_everything(config.train.seed)
    splits = config.data.load()
    backbone = config.backbone.model_copy(update={"weights": weights}).build(classes=len(splits.classes))
    _fit(splits, backbone)
    config.method.inject(backbone.model, backbone.targets)
    trainable = config.method.trainable(backbone.model, backbone.besides)
    methods.freeze_all_but(backbone.model, trainable)
    remat.apply(config.remat, backbone.blocks)
    make_optimizer = functools.partial(optim.make_optimizer, config.optim)
    engine = config.engine.prepare(backbone.model, backbone.blocks, make_optimizer, config.optim.clip_norm, device)
    return Built(weights, splits, backbone, trainable, engine)


def _fit(splits: Splits, backbone: Backbone) -> None:
    if splits.image_shape != backbone.image_shape:
        shapes = f"{backbone.image_shape}, the data gives {splits.image_shape}"
        message = f"the model takes images of (channels, height, width) {shapes}"
        raise ConfigError(Problem("backbone.image_size", message))


def say(config: Run, built: Built, device: torch.device) -> None:
    """Tells the user what will train, and on what."""
    sizes = {name: p.numel() for name, p in built.engine.model.named_parameters()}
    trains, total = sum(sizes[name] for name in built.trainable), sum(sizes.values())
    log.info(
        f"{built.backbone.name}, {config.method.name}: {trains:,} of {total:,} parameters train ({trains / total:.1%})"
    )
    log.info(f"{config.engine.name} on {dist.world_size()} x {device}, batch size {config.data.batch_size}")
