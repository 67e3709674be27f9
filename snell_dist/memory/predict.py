"""What a training step will hold, before anything is launched: the step itself, on the meta device, under the ledger.

Prediction and recording share the step, the ledger and with them every definition. Meta tensors have shapes and no
numbers; `standing_for` has them take the kernels and casts that the device's would. Of equal blocks three are run
(`depth`). What only a GPU shows is no part of this: see `overhead`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from snell_dist import dist, remat
from snell_dist.engines.ddp import Ddp
from snell_dist.footprint import Footprint, Moment, Owner, Phase, Weight
from snell_dist.memory import depth, rehearsal
from snell_dist.memory.standin import AMPERE, as_on, standing_for
from snell_dist.memory.timeline import Birth, Reading
from snell_dist.remat import Remat
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
    """One configuration on one device of a type ("cuda", "cpu"), for any number of images and any recomputation.

    capability: the GPU's compute capability, by which attention chooses its kernel. every_block: run them all, instead
    of three of each row of equal ones.
    Raises ConfigError where sections do not fit each other.
    """

    def __init__(
        self, config: Run, device_type: str = "cuda", capability: tuple[int, int] = AMPERE, every_block: bool = False
    ) -> None:
        self._device_type, self._every_block, self._remat = device_type, every_block, config.remat
        self._standing = partial(standing_for, device_type, capability)
        plain = config.model_copy(update={"remat": Remat()})
        with self._standing(), dist.alone():
            self._made = rehearsal.prepare(plain, META, engine=Ddp(name="ddp"), change=partial(as_on, device_type))
            rehearsal.make_state(self._made)
        self._update: tuple[list[Moment], list[Owner]] | None = None  # which is the same for any images

    @property
    def weights(self) -> list[Weight]:
        return self._made.weights

    @property
    def blocks(self) -> list[str]:
        return list(self._made.backbone.blocks)

    @property
    def classes(self) -> int:
        return self._made.classes

    def predict(self, micro_batch_size: int, micro_batches: int = 1, policy: Remat | None = None) -> Prediction:
        """One step. policy: in place of the configuration's."""
        reading, rows = self._read(micro_batch_size, micro_batches, policy or self._remat, self._update is None)
        flops, footprint = depth.total(reading.flops, rows), depth.lengthen(reading, rows)
        if self._update is None:
            self._update = _update(reading)
        else:
            footprint = footprint.followed_by(*self._update)
        return Prediction(footprint, self.weights, micro_batch_size, micro_batches, self.classes, flops)

    def births(self, phase: Phase, module: str, micro_batch_size: int, micro_batches: int = 1) -> list[Birth]:
        """What that step makes while this module is at work in this phase."""
        return depth.births(*self._read(micro_batch_size, micro_batches, self._remat, True), phase, module)

    def _read(
        self, micro_batch_size: int, micro_batches: int, policy: Remat, update: bool
    ) -> tuple[Reading, list[depth.Row]]:
        """update: with the optimizer's part of the step."""
        backbone = self._made.backbone
        for block in backbone.block_modules:
            vars(block).pop("forward", None)  # what the last call put there
        remat.apply(policy, backbone.block_modules)
        rows, left_out = ([], []) if self._every_block else depth.shorten(backbone)
        with self._standing(), dist.alone():
            made = replace(self._made, micro_batch_size=micro_batch_size, micro_batches=micro_batches)
            return rehearsal.record(made, "meta", self._device_type, left_out, update), rows


def _update(reading: Reading) -> tuple[list[Moment], list[Owner]]:
    """The moments of the optimizer's step, in which no block stands out, and the owners at the highest."""
    steps = [i for i, moment in enumerate(reading.moments) if moment.phase == Phase.STEP]
    highest = max(steps, key=lambda i: reading.moments[i].total)
    return [reading.moments[i] for i in steps], reading.owners(highest)


def predict(config: Run, micro_batch_size: int | None = None, micro_batches: int = 1) -> Prediction:
    """One step on a GPU that holds the whole model. None: the configuration's micro-batch, or else its whole batch."""
    return Predictor(config).predict(
        micro_batch_size or config.data.micro_batch_size or config.data.batch_size, micro_batches
    )
