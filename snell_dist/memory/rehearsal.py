"""A training step without data and without weights: memory depends on neither.

The model, method, precision, recomputation, task, engine and optimizer are those of a configuration, and so are the
calls that make a step; only the images are noise and the numbers of the model random. On the meta device there are no
numbers at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from snell_dist import methods, optim, precision, remat
from snell_dist.anatomy import Backbone
from snell_dist.data import Batch, Splits
from snell_dist.engines import Engine, EngineSection, Work
from snell_dist.footprint import OUTSIDE, Category, Phase, Weight
from snell_dist.memory.record import Ledger, owner, recording
from snell_dist.memory.timeline import Reading, block_of
from snell_dist.run_config import Run
from snell_dist.start import Start
from snell_dist.tasks import Task

CLASSES = 1000  # of a classifier, where the data does not say without a look at it
LR = 1e-6

OptimizerChanger = Callable[[torch.optim.Optimizer], torch.optim.Optimizer]


@dataclass(frozen=True)
class Rehearsal:
    """What takes part in a step. `classes`: how many the classifier has, `said` by the data or assumed."""

    backbone: Backbone
    task: Task
    engine: Engine
    micro_batch_size: int
    micro_batches: int
    weights: list[Weight]
    classes: int

    def step(self, ledger: Ledger | None = None, left_out: Sequence[nn.Parameter] = (), update: bool = True) -> None:
        """One optimizer step, as train.loop makes it. `left_out`: parameters that backward does not reach.

        update: False ends it before the optimizer's part.
        """
        engine: Any = self.engine if ledger is None else Told(self.engine, ledger)
        self.task.step(engine, self.batches())
        if not update:
            self.backbone.model.zero_grad()
            return
        if ledger is not None:
            ledger.enter(Phase.STEP)
        for parameter in left_out:
            parameter.grad = torch.empty_like(parameter)
        engine.step(LR)

    def batches(self) -> Iterator[Batch]:
        """Grey images of class 0, in host memory, each micro-batch made when it is asked for, as in training."""
        size, last = self.micro_batch_size, self.micro_batches - 1
        for number in range(self.micro_batches):
            images, labels = torch.zeros(size, *self.backbone.image_shape), torch.zeros(size, dtype=torch.int64)
            yield Batch(images, labels, total=size * self.micro_batches, last=number == last)


class Told:
    """An engine that tells a ledger which phase of the step it is in."""

    def __init__(self, engine: Engine, ledger: Ledger) -> None:
        self._engine, self._ledger = engine, ledger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def accumulate(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in self._engine.accumulate(batches):
            self._ledger.own([(OUTSIDE, batch.images), (OUTSIDE, batch.labels)], Category.INPUTS)
            self._ledger.enter(Phase.FORWARD)
            yield batch

    def forward(self, *inputs: Any) -> Any:
        self._ledger.enter(Phase.FORWARD)
        return self._engine.forward(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._ledger.enter(Phase.BACKWARD)
        self._engine.backward(loss)

    def step(self, lr: float) -> Tensor:
        self._ledger.own(_gradients(self._engine.model), Category.GRADIENTS)
        self._ledger.enter(Phase.STEP)
        return self._engine.step(lr)


def classes_of(config: Run) -> int:
    return config.data.class_count() or CLASSES


def prepare(
    config: Run,
    device: torch.device,
    micro_batch_size: int = 1,
    accumulation: int = 1,
    engine: EngineSection | None = None,
    change: OptimizerChanger = lambda optimizer: optimizer,
) -> Rehearsal:
    """Everything of a step on a device. `engine`: in place of the configuration's; `change`: the optimizer's settings.

    Raises ConfigError where sections do not fit each other.
    """
    classes = classes_of(config)
    section = config.backbone.model_copy(update={"weights": None, "head": "new"})
    nothing: Any = ()
    splits = Splits(nothing, nothing, nothing, [str(number) for number in range(classes)], image_shape=(0, 0, 0))
    with torch.device("meta") if device.type == "meta" else nullcontext():
        backbone = config.task.build(section, splits.classes)
        config.method.inject(backbone)
    if context := getattr(backbone.model, "context_length", None):  # the true tokenizer may need the hub
        backbone = replace(backbone, tokenize=lambda texts: torch.zeros(len(texts), context, dtype=torch.int64))
    task = config.task.prepare(backbone, splits)
    trainable = config.method.trainable(backbone)
    methods.freeze_all_but(backbone.model, trainable)
    precision.apply(config.precision, backbone.model, trainable)
    weights = weights_of(backbone, trainable)
    remat.apply(config.remat, backbone.block_modules)

    def make_optimizer(named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return change(optim.make_optimizer(config.optim, named))

    work = Work(
        model=backbone.model,
        fill=Start(shared=False).fill,
        blocks={name: backbone.model.get_submodule(name) for name in backbone.blocks.values()},
        remembered=list(methods.remembered(backbone.model)),
        make_optimizer=make_optimizer,
        optim=config.optim,
        precision=config.precision,
        device=device,
        micro_batch_size=micro_batch_size,
        accumulation=accumulation,
        skip_nonfinite=False,
    )
    prepared = (engine or config.engine).prepare(work)
    backbone.model.train()
    return Rehearsal(backbone, task, prepared, micro_batch_size, accumulation, weights, classes)


def record(
    rehearsal: Rehearsal,
    device_type: str,
    stands_for: str | None = None,
    left_out: Sequence[nn.Parameter] = (),
    update: bool = True,
) -> Reading:
    """The second step, which finds the optimizer's state there; on the meta device `make_state` makes that."""
    with recording(rehearsal.backbone.model, rehearsal.backbone.blocks, device_type, stands_for) as ledger:
        own(ledger, rehearsal)
        if device_type != "meta":
            rehearsal.step(ledger)
        ledger.restart()
        own(ledger, rehearsal)
        rehearsal.step(ledger, left_out, update)
        return ledger.reading()


def make_state(rehearsal: Rehearsal) -> None:
    """What the first step leaves, without its forward and backward: all that the meta device needs of it."""
    for parameter in rehearsal.backbone.model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    rehearsal.engine.step(LR)


def own(ledger: Ledger, rehearsal: Rehearsal) -> None:
    """Tells a ledger what is there between steps."""
    model = rehearsal.backbone.model
    for category, trains in ((Category.FROZEN, False), (Category.TRAINABLE, True)):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad == trains]
        ledger.own([(owner(n), _part(p)) for n, p in named], category)
        ledger.own([(owner(n), p) for n, p in named if _part(p) is not p and not _sharded(p)], Category.GATHERED)
    ledger.own([(owner(n), b) for n, b in model.named_buffers()], Category.BUFFERS)
    ledger.own(_state(rehearsal.engine), Category.OPTIMIZER)


def weights_of(backbone: Backbone, trainable: Sequence[str]) -> list[Weight]:
    """Every parameter of the model, with its block."""
    trains, addresses = set(trainable), {name: address for address, name in backbone.blocks.items()}
    found = []
    for name, parameter in backbone.model.named_parameters():
        found.append(Weight(name, block_of(name, addresses), tuple(parameter.shape), parameter.nbytes, name in trains))
    return found


def _gradients(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(owner(n), _part(p.grad)) for n, p in model.named_parameters() if p.grad is not None]


def _state(engine: Engine) -> list[tuple[str, Tensor]]:
    """The optimizer's tensors, which are among those that an engine holds and no parameter or buffer."""
    kept = {_storage(_part(t)) for t in (*engine.model.parameters(), *engine.model.buffers())}
    return [(owner(name), tensor) for name, tensor in engine.held() if _storage(tensor) not in kept]


def _sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def _part(tensor: Any) -> Tensor:
    """This rank's part of a tensor that FSDP2 or ZeRO-3 has divided."""
    return tensor.to_local() if _sharded(tensor) else getattr(tensor, "ds_tensor", tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
