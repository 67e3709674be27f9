"""What real processes hold and send in a training step, counted without the package's own instrument.

A process may also pretend to be the first of many ranks: torch's fake process group sends nothing. A collective's
thread may be the last to let go of a tensor, which torch's profiler then does not see: storages are asked, at every
operation, whether they are still there.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from snell_dist import dist, meeting
from snell_dist.build import Built, build
from snell_dist.config import load
from snell_dist.feed import Feed
from snell_dist.run_config import Run

SETTLES_S = 0.0005  # until a collective's thread has let go of what only chance makes it hold
CPU = torch.device("cpu")
MEASURED = 2  # the step of which is told; states exist, DDP has rebuilt its buckets


class Alive(TorchDispatchMode):
    """Bytes alive after each operation, of the storages that operations made, by phase and block; and collectives."""

    def __init__(self) -> None:
        super().__init__()
        self._made, self._foreign = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self.moments: list[dict[str, Any]] = []
        self.wire: list[tuple[str, int, int]] = []  # name, bytes of the largest tensor, ranks that take part

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it will be asked again, for the tensors inside
        taken = tree_leaves((args, kwargs))
        for storage in storages(taken):
            if storage not in self._made:
                self._foreign[storage] = True
        result = function(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(result))
        if function.namespace == "c10d":
            group = next(torch.distributed.ProcessGroup.unbox(x) for x in taken if isinstance(x, torch.ScriptObject))
            largest = max((t.nbytes for t in taken if isinstance(t, Tensor)), default=0)
            self.wire.append((function._schema.name.removeprefix("c10d::").strip("_"), largest, group.size()))
        self._look()
        return result

    def add(self, tensors: Any) -> None:
        for storage in storages(tensors):
            if storage not in self._foreign:
                self._made[storage] = True

    def enter(self, phase: str, block: str, model: nn.Module) -> None:
        self.moments.append({"phase": phase, "block": block, "highest": 0, "gradients": 0, "module": model})
        self._look()
        here = self.moments[-1]
        here |= {"start": here["highest"], "gradients_at_start": here["gradients"]}

    def _look(self) -> None:
        if self.moments:
            here, live = self.moments[-1], self._live()
            if live > here["highest"] and torch.distributed.is_initialized():
                time.sleep(SETTLES_S)
                live = self._live()
            if live > here["highest"]:
                here |= {"highest": live, "gradients": gradient_bytes(here["module"])}

    def _live(self) -> int:
        return sum(storage.nbytes() for storage in self._made)


def storages(leaves: Any) -> Iterator[Any]:
    for leaf in leaves:
        if type(leaf) in (Tensor, nn.Parameter) and leaf.device.type == "cpu":
            yield leaf.untyped_storage()


Plan = Mapping[str, list[str]]  # a name's overrides of a configuration


def count(plan: Plan, out: Path) -> None:
    """OUT/<name>.json: what every rank saw in its third step, from the moment that the engine took the model."""
    with meeting.process_group(CPU):
        for name, overrides in plan.items():
            found = dist.gather_objects(measure(overrides))
            if dist.rank() == 0:
                (out / f"{name}.json").write_text(json.dumps(found))


def pretend(plans: Mapping[int, Plan], out: Path) -> None:
    """The same of the first of so many ranks, without the others."""
    for ranks, plan in plans.items():
        os.environ["WORLD_SIZE"] = str(ranks)
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        for name, overrides in plan.items():
            (out / f"{name}.json").write_text(json.dumps([measure(overrides)]))
        torch.distributed.destroy_process_group()


def measure(overrides: list[str]) -> dict[str, Any]:
    """Of this rank: bytes held between steps, the time line of a step, what went over the wire."""
    config = load("demo", overrides, Run).config
    with taken_over(type(config.engine)) as alive:
        built = build(config, None, CPU)
        engine, weights = built.engine, described(built)
        feed = Feed(built.splits.train, config.data, 0, 0, MEASURED + 1)
        engine.model.train()
        for step in range(MEASURED + 1):
            if step == MEASURED:
                watch(built, alive)
                held = {s.data_ptr(): s.nbytes() for s in storages(tensor for _, tensor in engine.held())}
                alive.wire.clear()
                alive.enter("between", "", engine.model)
                alive.enter("forward", "", engine.model)
            built.task.step(engine, feed.step())
            if step == MEASURED:
                alive.enter("step", "", engine.model)
            engine.step(1e-3)
        alive.enter("between", "", engine.model)
    for moment in alive.moments:
        del moment["module"]
    return {
        "held": sum(held.values()),
        "moments": alive.moments,
        "wire": alive.wire,
        "weights": weights,
        "blocks": list(built.backbone.blocks.values()),
    }


@contextmanager
def taken_over(section: type) -> Iterator[Alive]:
    """Counts from where `section.prepare` is called, the model's tensors included."""
    alive, prepare = Alive(), section.prepare

    def begin(self: Any, work: Any) -> Any:
        alive.__enter__()
        alive.add([*work.model.parameters(), *work.model.buffers()])
        return prepare(self, work)

    section.prepare = begin
    try:
        yield alive
    finally:
        section.prepare = prepare
        alive.__exit__(None, None, None)


def watch(built: Built, alive: Alive) -> None:
    """Tells where the step enters a block, forward and backward, before the engine's own hooks do anything."""
    model, blocks = built.engine.model, list(built.backbone.blocks.values())

    def before(block: str, module: nn.Module, inputs: Any) -> None:
        alive.enter("forward", block, model)

    def after(block: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if isinstance(outputs, Tensor) and outputs.requires_grad:
            outputs.register_hook(lambda gradient: alive.enter("backward", block, model))

    for name in blocks:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(functools.partial(before, name), prepend=True)
        module.register_forward_hook(functools.partial(after, name), prepend=True)
    model.get_submodule(blocks[-1]).register_forward_hook(lambda *_: alive.enter("forward", "", model))
    model.register_forward_hook(functools.partial(after, ""), prepend=True)


def gradient_bytes(model: nn.Module) -> int:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    local = [getattr(gradient, "_local_tensor", gradient) for gradient in gradients]
    return sum({s.data_ptr(): s.nbytes() for s in storages(local)}.values())


def described(built: Built) -> list[dict[str, Any]]:
    """The model's parameters, whole."""
    blocks, found = list(built.backbone.blocks.values()), []
    for name, parameter in built.engine.model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        block = next((b for b in blocks if name.startswith(f"{b}.")), "")
        size = torch.Size(shape).numel() * parameter.element_size()
        found.append({"name": name, "block": block, "shape": shape, "bytes": size, "trains": parameter.requires_grad})
    return found
