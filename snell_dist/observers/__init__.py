"""Observers: everything in a run that is not training hangs here, and the loop stays clean."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Moment:
    """The end of a step. `metrics` is empty but at the steps that log: loss, grad_norm, lr, val_accuracy, ..."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)


class Observer(Protocol):
    def on_step(self, moment: Moment) -> None:
        """After each step, from step 0."""
        ...

    def on_end(self, summary: dict[str, Any]) -> None:
        """When training ends or is interrupted; may add to the summary. Called once, also after an error."""
        ...


class StepTimer:
    """Seconds of each step, without a synchronisation that training does not need."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[Any, Any]] = []
        self._begin: Any = None
        self.seconds: list[float] = []

    def start(self) -> None:
        self._begin = self._now()

    def stop(self) -> None:
        self._pending.append((self._begin, self._now()))

    def drain(self) -> list[float]:
        """Times of the steps so far, in seconds; on CUDA this waits for the last of them."""
        for begin, end in self._pending:
            if self._cuda:
                end.synchronize()
                self.seconds.append(begin.elapsed_time(end) / 1000)
            else:
                self.seconds.append(end - begin)
        self._pending.clear()
        return self.seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
