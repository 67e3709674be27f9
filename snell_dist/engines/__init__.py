"""Engines: who runs forward, backward and the optimizer step. One file an engine, found by its name.

Engines know neither methods nor backbones: they get a model whose trainable parameters require gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from snell_dist.config import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from snell_dist.data import Batch
    from snell_dist.precision import Precision

    MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Work:
    """What an engine is given: a model whose frozen parameters need no gradient, and how to train it."""

    model: nn.Module
    blocks: list[nn.Module]  # in order: the unit of sharding
    remembered: list[str]  # buffers that a resumed run needs besides what trains
    make_optimizer: MakeOptimizer
    clip_norm: float | None
    precision: Precision
    device: torch.device


class Engine(Protocol):
    """What the loop needs. Tensors of `state` are keyed `model/<name>` and `optimizer/<name>/<state>`."""

    model: nn.Module  # the model itself, with the backbone's parameter names
    device: torch.device

    def accumulate(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The micro-batches of one step, on the device; gradients are reduced with the last one."""
        ...

    def forward(self, *inputs: Any) -> Any:
        """The model's outputs, in float32: images [B, C, H, W] to logits [B, classes], for a classifier."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> Tensor:
        """Clips, and steps the optimizer at this learning rate. Returns the norm before clipping."""
        ...

    def clear(self) -> None:
        """Forgets the gradients, which stay after `step` for those who look at them."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What trains, and its optimizer state: everything that a resumed run needs besides the step."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class EngineSection(Section):
    """What every engine says."""

    name: str

    def prepare(self, work: Work) -> Engine:
        raise NotImplementedError
