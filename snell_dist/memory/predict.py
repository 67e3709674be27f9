"""What a training step will hold, before anything is launched: the step itself, on the meta device, under the ledger.

Prediction and recording share the step, the ledger and with them every definition. Meta tensors have shapes and no
numbers; `standing_for` has them take the kernels and casts that the device's would. Of equal blocks three are run
(`depth`). What only a GPU shows is no part of this: see `overhead`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from snell_dist.engines.ddp import Ddp
from snell_dist.footprint import Footprint, Weight
from snell_dist.memory import depth, rehearsal
from snell_dist.memory.standin import as_on, standing_for
from snell_dist.run_config import Run

META = torch.device("meta")


@dataclass(frozen=True)
class Prediction:
    """Of one process that holds the whole model and takes micro-batches of `micro_batch_size` images.

    flops: operations of a step, a multiplication and an addition being two.
    """

    footprint: Footprint
    weights: list[Weight]
    micro_batch_size: int
    micro_batches: int  # of a step
    classes: int
    flops: int

    @property
    def trainable_numbers(self) -> int:
        return sum(weight.numbers for weight in self.weights if weight.trains)


class Predictor:
    """One configuration on one device of a type ("cuda", "cpu"), for any number of images.

    every_block: run them all, instead of three of each row of equal ones.
    Raises ConfigError where sections do not fit each other.
    """

    def __init__(self, config: Run, device_type: str = "cuda", every_block: bool = False) -> None:
        self._device_type = device_type
        with standing_for(device_type):
            self._made = rehearsal.prepare(
                config, META, engine=Ddp(name="ddp"), change=lambda optimizer: as_on(device_type, optimizer)
            )
        self._rows, self._left_out = ([], []) if every_block else depth.shorten(self._made.backbone)

    @property
    def weights(self) -> list[Weight]:
        return self._made.weights

    @property
    def blocks(self) -> list[str]:
        return list(self._made.backbone.blocks)

    @property
    def classes(self) -> int:
        return self._made.classes

    def predict(self, micro_batch_size: int, micro_batches: int = 1) -> Prediction:
        """One step."""
        batches = rehearsal.batches(self._made.backbone.image_shape, micro_batch_size, micro_batches)
        with standing_for(self._device_type):
            reading = rehearsal.record(replace(self._made, batches=batches), "meta", self._device_type, self._left_out)
        flops = depth.total(reading.flops, self._rows)
        footprint = depth.lengthen(reading, self._rows)
        return Prediction(footprint, self._made.weights, micro_batch_size, micro_batches, self._made.classes, flops)


def predict(config: Run, micro_batch_size: int | None = None, micro_batches: int = 1) -> Prediction:
    """One step on a GPU that holds the whole model. None: the configuration's micro-batch, or else its whole batch."""
    return Predictor(config).predict(
        micro_batch_size or config.data.micro_batch_size or config.data.batch_size, micro_batches
    )
