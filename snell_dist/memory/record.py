"""A ledger of live bytes: one instrument for CPU tensors, CUDA tensors and meta tensors.

A TorchDispatchMode sees every operator. A storage is booked where it is first seen and struck out when its last
reference dies. What it was for is known only afterwards (what outlived the forward was saved for backward), so the
ledger keeps each storage's birth and death, and `footprint` tells categories apart at the end:

    given by the caller        parameters, buffers, optimizer state, inputs; gradients when they are accumulated
    saved activations          born in a forward (or its recomputation) and alive after it
    adapter temporaries        born and dead within one visit of an adapted layer
    gathered shards            resized in place, as FSDP2 does with whole parameters, or given to an all-gather
    communication              given to another collective
    other temporaries          the rest

Modules are followed by forward hooks, in backward by the graph's nodes that made a module's outputs and inputs.
Not seen: what a kernel allocates inside itself (torch's CPU attention takes some KiB for each thread).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from snell_dist.adapted import AdaptedLinear
from snell_dist.footprint import Category, Phase
from snell_dist.memory.timeline import History, Reading, Segment, Storage, Visit, read
from snell_dist.ops import library

ROUND = {"cuda": 512}  # what an allocator rounds a size up to, in bytes
KEY = "snell_dist ledger"  # in the graph's nodes
MESSAGES = ("c10d", "_c10d_functional", "fsdp")  # namespaces of collectives


@dataclass(frozen=True)
class Inside:
    """What one operator did with memory: (size, birth, death, which of its results), in ticks from its beginning."""

    pieces: list[tuple[int, int, int | None, int | None]]
    ticks: int
    flops: int


class Ledger(TorchDispatchMode):
    """`recording` opens it. `own` says what is there before a step, `enter` in which phase it is.

    blocks: addresses of blocks by the modules' names. device_type: tensors elsewhere are left alone (meta tensors
    stand for `stands_for`, whose allocator's rounding is taken).
    """

    def __init__(
        self, model: nn.Module, blocks: Mapping[str, str], device_type: str, stands_for: str | None = None
    ) -> None:
        super().__init__()
        self._device_type, self._round = device_type, ROUND.get(stands_for or device_type, 1)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._adapted = {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
        self._blocks = {name: address for address, name in blocks.items()}
        self._model, self._closing = model, ExitStack()
        self._stack = list[str]()
        self._live: dict[int, Storage] = {}
        self._seen: dict[Any, Inside] = {}
        self.restart()

    # What the caller says.

    def own(self, tensors: Iterable[tuple[str, Tensor]], category: Category) -> None:
        """Tensors of this category, each with the name of its module."""
        for module, tensor in tensors:
            if (storage := self._book(tensor)) is not None:
                storage.category, storage.module = category, module

    def enter(self, phase: Phase) -> None:
        """From here on the step is in this phase."""
        if phase != self._phase:
            self._change(phase)
        self._stack.clear()
        self._behind = ""

    def restart(self) -> None:
        """Forgets what has been, but for what lives: a step begins."""
        self._clock = 0
        self._phase, self._behind = Phase.FORWARD, ""
        self._stack.clear()
        self._visits = [Visit(0, Phase.FORWARD, "")]
        self._segments = [Segment(Phase.FORWARD)]
        self._flops: Counter[str] = Counter()
        self._all = list(self._live.values())
        for storage in self._all:
            storage.born = storage.segment = storage.visit = 0

    # What the ledger sees.

    def open(self) -> None:
        """Begins to follow modules, gradients and storages that change their size."""
        ledger, resize = self, torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            made = resize(storage, size)
            ledger._resized(storage)
            return made

        trained = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        self._closing.callback(setattr, torch.UntypedStorage, "resize_", resize)
        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        for handle in (
            module_hooks.register_module_forward_pre_hook(self._before_forward),
            module_hooks.register_module_forward_hook(self._after_forward, always_call=True),
            *(p.register_post_accumulate_grad_hook(self._accumulated(owner(name))) for name, p in trained),
        ):
            self._closing.callback(handle.remove)

    def close(self) -> None:
        """What was seen stays."""
        self._closing.close()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(not issubclass(t, (Tensor, nn.Parameter)) or _wraps(t) for t in types):
            return NotImplemented  # a DTensor's own parts come by again
        kwargs = kwargs or {}
        collective = function.namespace in MESSAGES
        for leaf in tree_leaves((args, kwargs)) if collective else _tensors(args):
            storage = self._book(leaf)
            if collective and storage is not None and storage.category is None:
                gathers = "gather" in function._schema.name
                storage.category = Category.GATHERED if gathers else Category.COMMUNICATION
        self._recomputing()
        implementation = library.inside(function) if function.namespace == "snell" else None
        if implementation is None:
            made = function(*args, **kwargs)
            count = flop_registry.get(function._overloadpacket) if self._device_type == "meta" else None
            if count is not None:
                self._flops[self._module] += count(*args, **kwargs, out_val=made)
        else:
            made = self._look_inside(function, implementation, args)
        for leaf in _tensors(_several(made)):
            self._book(leaf)
        return made

    def _look_inside(self, function: Any, implementation: Any, args: Any) -> Any:
        """Runs an operator of ours under the ledger. On meta one of a kind: the next does the same with its memory."""
        kind = function, tuple(_kind(argument) for argument in args)
        seen = self._seen.get(kind)
        if seen is None:
            begin, known, flops = self._clock, len(self._all), self._flops[self._module]
            with self:
                made = implementation(*args)
            if self._device_type == "meta":
                results = {id(self._book(leaf)): i for i, leaf in enumerate(_tensors(_several(made)))}
                pieces = [
                    (s.size, s.born - begin, None if s.died is None else s.died - begin, results.get(id(s)))
                    for s in self._all[known:]
                ]
                self._seen[kind] = Inside(pieces, self._clock - begin, self._flops[self._module] - flops)
            return made
        made = function(*args)
        begin, outputs = self._clock, _tensors(_several(made))
        for size, born, died, result in seen.pieces:
            if result is None:
                storage = Storage(size, 0, len(self._segments) - 1, len(self._visits) - 1, self._module)
                self._all.append(storage)
                storage.died = None if died is None else begin + died
            else:
                storage = self._add(outputs[result].untyped_storage())
            storage.born = begin + born
        self._clock = begin + seen.ticks
        self._flops[self._module] += seen.flops
        return made

    def _book(self, tensor: Any) -> Storage | None:
        if not isinstance(tensor, Tensor) or tensor.device.type != self._device_type:
            return None
        untyped = tensor.untyped_storage()
        key = untyped._cdata
        found = self._live.get(key)
        if found is not None or not untyped.nbytes():
            return found
        return self._add(untyped)

    def _add(self, untyped: torch.UntypedStorage) -> Storage:
        key, size = untyped._cdata, -(-untyped.nbytes() // self._round) * self._round
        self._clock += 1
        storage = Storage(size, self._clock, len(self._segments) - 1, len(self._visits) - 1, self._module)
        storage.reference = weakref.ref(untyped, lambda _: self._strike(key, storage))
        self._live[key] = storage
        self._all.append(storage)
        return storage

    def _strike(self, key: int, storage: Storage) -> None:
        if self._live.get(key) is storage:
            del self._live[key]
        self._clock += 1
        storage.died = self._clock

    def _resized(self, untyped: torch.UntypedStorage) -> None:
        if untyped.device.type != self._device_type:
            return
        if (known := self._live.get(untyped._cdata)) is not None:
            known.reference = None
            self._strike(untyped._cdata, known)
        if untyped.nbytes():
            self._add(untyped).category = Category.GATHERED

    # Where the step is.

    @property
    def _module(self) -> str:
        return self._stack[-1] if self._stack else self._behind

    def _change(self, phase: Phase) -> None:
        self._clock += 1
        self._segments[-1].end = self._clock
        self._segments.append(Segment(phase))
        self._phase = phase
        self._visit()

    def _visit(self) -> None:
        if (self._visits[-1].phase, self._visits[-1].module) != (self._phase, self._module):
            self._clock += 1
            self._visits.append(Visit(self._clock, self._phase, self._module))

    def _recomputing(self) -> None:
        """Within backward, only a recomputed forward has gradients switched on."""
        if self._phase in (Phase.BACKWARD, Phase.RECOMPUTE):
            inside = torch._C._current_graph_task_id() != -1  # the loss's own last operations are not
            phase = Phase.RECOMPUTE if inside and torch.is_grad_enabled() else Phase.BACKWARD
            if phase != self._phase:
                if phase == Phase.BACKWARD:
                    self._stack.clear()  # a recomputation may stop early
                self._change(phase)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        if name is not None:
            self._recomputing()
            self._mark(args, self._module)
            self._stack.append(name)
            self._visit()

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is not None and self._stack:
            self._mark(output, name)
            while self._stack and self._stack.pop() != name:
                pass
            self._visit()

    def _mark(self, tensors: Any, name: str) -> None:
        """In backward, the nodes that made these begin a visit of the module, unless they begin another's."""
        for leaf in tree_leaves(tensors):
            node: Any = leaf.grad_fn if isinstance(leaf, Tensor) else None
            if node is not None and KEY not in node.metadata:
                node.metadata[KEY] = True
                node.register_prehook(self._arrival(name))

    def _arrival(self, name: str) -> Any:
        def arrive(*gradients: Any) -> None:
            self._stack.clear()
            self._behind = name
            self._recomputing()
            self._visit()

        return arrive

    def _accumulated(self, module: str) -> Any:
        def accumulated(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.own([(module, parameter.grad)], Category.GRADIENTS)

        return accumulated

    def reading(self) -> Reading:
        """What has been since `restart`."""
        return read(
            History(self._all, self._visits, self._segments, self._clock + 1, self._flops), self._blocks, self._adapted
        )


@contextmanager
def recording(
    model: nn.Module, blocks: Mapping[str, str], device_type: str, stands_for: str | None = None
) -> Iterator[Ledger]:
    """A ledger of what happens within the block. After it nothing of it is left in torch."""
    ledger = Ledger(model, blocks, device_type, stands_for)
    ledger.open()
    try:
        with ledger:
            yield ledger
    finally:
        ledger.close()


def owner(parameter: str) -> str:
    """The name of a parameter's module."""
    return parameter.rpartition(".")[0]


def _wraps(kind: type) -> bool:
    """Whether tensors of this class are made of others, as DTensor is."""
    return (
        kind is not Tensor
        and kind is not nn.Parameter
        and hasattr(kind, "__torch_dispatch__")
        and (kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl)
    )


def _several(made: Any) -> Any:
    return made if isinstance(made, (tuple, list)) else (made,)


def _kind(argument: Any) -> Any:
    """All of an argument that memory may depend on."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.stride()
    return tuple(argument) if isinstance(argument, list) else argument


def _tensors(values: Any) -> list[Tensor]:
    """Those among values, and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found
