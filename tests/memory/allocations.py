"""What a step really allocates on the CPU, by the allocator's own events: torch's profiler, and no ledger of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from snell_dist.memory.rehearsal import Rehearsal

# Kernels of the CPU that take room for themselves: oneDNN's workspaces, and a product's copy of a mask in its other
# operand's dtype. No tensor, and on a GPU there is none, or another.
KERNELS = "aten::convolution", "aten::convolution_backward", "aten::mul"


@dataclass(frozen=True)
class Block:
    """One piece of memory, in nanoseconds; what was there before the step has no birth here."""

    size: int
    born: int
    died: int | None
    scratch: bool  # a kernel's own, given back before it ends


@dataclass(frozen=True)
class Truth:
    """Bytes. `held`: before the step; `ranges`: (name, start, end) of blocks and phases."""

    held: int
    blocks: list[Block]
    freed: list[tuple[int, int]]  # (time, size) of what was there before
    ranges: list[tuple[str, int, int]]

    def peak(self, scratch: bool = True) -> int:
        """With or without what KERNELS take for themselves."""
        chosen = [b for b in self.blocks if scratch or not b.scratch]
        events = [(b.born, b.size) for b in chosen] + [(b.died, -b.size) for b in chosen if b.died is not None]
        live = highest = self.held
        for _, change in sorted([*events, *((time, -size) for time, size in self.freed)]):
            live += change
            highest = max(highest, live)
        return highest

    def begins(self, name: str) -> int:
        return next(start for known, start, _ in self.ranges if known == name)

    def saved(self, address: str | None = None) -> int:
        """What the forward (of a block) made and backward finds."""
        backward = self.begins("backward")
        start, end = next((s, e) for name, s, e in self.ranges if name == address) if address else (0, backward)
        return sum(b.size for b in self.blocks if start <= b.born < end and (b.died is None or b.died > backward))


def true_step(made: Rehearsal) -> Truth:
    """The second step, in which the optimizer's state is there."""
    made.step()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in made.engine.held()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, _told(made):
        made.step()
    results: Any = profiler.profiler.kineto_results  # type: ignore[union-attr]
    blocks, freed, ranges, live = [], [], [], {}
    for event in sorted(_below(results.experimental_event_tree()), key=lambda event: event.start_time_ns):
        kind = event.tag.name
        if kind != "Allocation":
            ranges.append((event.name, event.start_time_ns, event.end_time_ns))
            continue
        memory = event.extra_fields
        if memory.alloc_size > 0:
            live[memory.ptr] = event
        elif memory.ptr in live:
            birth = live.pop(memory.ptr)
            blocks.append(_block(birth, event))
        else:
            freed.append((event.start_time_ns, -memory.alloc_size))
    blocks += [_block(birth, None) for birth in live.values()]
    return Truth(sum(held.values()), blocks, freed, ranges)


def _block(birth: Any, death: Any | None) -> Block:
    kernel = birth.parent
    while kernel is not None and kernel.name not in KERNELS:
        kernel = kernel.parent
    scratch = kernel is not None and death is not None and death.start_time_ns <= kernel.end_time_ns
    return Block(birth.extra_fields.alloc_size, birth.start_time_ns, death and death.start_time_ns, scratch)


def _below(events: list[Any]) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children


@contextmanager
def _told(made: Rehearsal) -> Iterator[None]:
    """Ranges of the blocks' forward, by their addresses, and of backward and the optimizer's step."""
    ranges: list[Any] = []

    def enter(name: str) -> None:
        ranges.append(record_function(name))
        ranges[-1].__enter__()

    handles = []
    for address, name in made.backbone.blocks.items():
        block = made.backbone.model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(lambda *_, address=address: enter(address)))
        handles.append(block.register_forward_hook(lambda *_: ranges.pop().__exit__(None, None, None)))
    engine: Any = made.engine
    originals = engine.backward, engine.step
    engine.backward, engine.step = _named("backward", originals[0]), _named("step", originals[1])
    try:
        yield
    finally:
        engine.backward, engine.step = originals
        for handle in handles:
            handle.remove()


def _named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with record_function(name):
            return call(*arguments)

    return run
