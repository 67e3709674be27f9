"""Peak memory of training, measured: CUDA's allocator counts it; on the CPU torch's profiler does.

The CPU figure is that of tensors (weights, gradients, optimizer state, activations, temporaries), in one
step, the third, when optimizer state exists. It leaves out the interpreter and the libraries' own memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from snell_dist.engines import Engine
    from snell_dist.observers import Moment

MIB = 2**20
RECORDED_STEP = 2


class PeakMemory:
    """Observer: adds `peak_memory_mib` to the summary (None where the device cannot tell)."""

    def __init__(self, engine: Engine, start: int) -> None:
        self._engine, self._before = engine, start + RECORDED_STEP - 1
        self._profiler: Any = None
        self._held = 0
        self.peak_mib: float | None = None
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(engine.device)  # a process may train several runs

    def on_step(self, moment: Moment) -> None:
        kind = self._engine.device.type
        if kind == "cuda":
            self.peak_mib = torch.cuda.max_memory_allocated() / MIB
        elif kind == "cpu":
            if self._profiler is not None:
                self._profiler.__exit__(None, None, None)
                self.peak_mib = (self._held + peak_of(self._profiler)) / MIB
                self._profiler = None
            if moment.step == self._before:
                self._held = held_bytes(self._engine)
                self._profiler = memory_profiler()
                self._profiler.__enter__()

    def on_end(self, summary: dict[str, Any]) -> None:
        if self._profiler is not None:  # the run ended inside the recorded step
            self._profiler.__exit__(None, None, None)
            self._profiler = None
        summary["peak_memory_mib"] = self.peak_mib


def process_mib(device: torch.device) -> float:
    """The highest so far: on CUDA what the allocator gave out, elsewhere the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def held_bytes(engine: Engine) -> int:
    """Bytes that stay between steps: parameters, buffers and optimizer state (gradients are cleared)."""
    storages = [tensor.untyped_storage() for _, tensor in engine.held()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_of(profiler: torch.profiler.profile) -> int:
    """The highest sum of CPU bytes allocated and freed while the profiler ran."""
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = [e for e in results.events() if e.name() == "[memory]" and e.device_index() == -1]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


class Touched(TorchDispatchMode):
    """Remembers the memory of every tensor that an operation within the block reads or makes, on whatever device."""

    def __init__(self) -> None:
        super().__init__()
        self._storages = WeakIdKeyDictionary()  # of those that live

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, made)):
            if isinstance(leaf, torch.Tensor):
                self._storages[leaf.untyped_storage()] = True
        return made

    def living_bytes(self, but: Iterable[Tensor]) -> int:
        """Of all tensors' memory that lives now, but for the memory of these."""
        known = {tensor.untyped_storage()._cdata for tensor in but}
        return sum(storage.nbytes() for storage in self._storages if storage._cdata not in known)


def memory_profiler() -> torch.profiler.profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its own start and end to the terminal
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
