"""What a finished run says of itself: its figures, and the protocol card that makes them comparable."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from snell_dist import dist
from snell_dist.build import Built
from snell_dist.evaluate import Measured
from snell_dist.inventory import numbers
from snell_dist.run_config import Run


def summary(
    config: Run, built: Built, test: Measured, val: Measured | None, chosen_step: int, seconds: Sequence[float]
) -> dict[str, Any]:
    """`val` is None where its images were trained on. `seconds`: of each training step."""
    return {
        "method": config.method.name,
        "base": built.backbone.name,
        "base_weights": built.weights,
        "base_sha256": built.fingerprint,
        "protocol": card(config, built, chosen_step),
        "trainable_parameters": numbers(built.inventory, trains=True),
        "parameters": numbers(built.inventory),
        **{f"test_{name}": value for name, value in test.metrics.items()},
        "test_images": len(built.splits.test),
        "val_accuracy": val.metrics["accuracy"] if val else None,
        "classes": built.splits.classes,
        "preprocessing": asdict(built.splits.preprocessing) if built.splits.preprocessing else None,
        "steps": built.steps,
        "median_step_s": statistics.median(seconds) if seconds else None,
    }


def card(config: Run, built: Built, chosen_step: int) -> dict[str, Any]:
    """How the result came about, in plain strings and numbers."""
    splits, protocol = built.splits, config.protocol
    looks = sum(config.train.looks(done, built.steps_per_epoch) for done in range(1, built.steps + 1))
    marked = protocol.looks_at == "test"
    return {
        **splits.about,
        "train_images": len(splits.train),
        "val_images": len(splits.val),
        "test_images": len(splits.test),
        "val_trains": splits.val_trains,
        "data_sha256": splits.sha256(),
        "select": protocol.select,
        "chosen": protocol.chosen(chosen_step, built.steps, looks),
        "marked": marked,  # chosen on the test images
        "test_looks": looks if marked else 1,
        "steps": built.steps,
        "epochs": built.steps / built.steps_per_epoch,
        "batch_size": config.data.batch_size,
        "world_size": dist.world_size(),
        "seed": config.train.seed,
    }
