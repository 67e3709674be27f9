"""Engines: who runs forward, backward and the optimizer step. One file an engine, found by its name.

Engines know neither methods nor backbones: they get a model whose trainable parameters require gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from snell_dist.config import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from snell_dist.data import Batch

    MakeOptimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


class Engine(Protocol):
    """What the loop needs. Tensors of `state` are keyed `model/<name>` and `optimizer/<name>/<state>`."""

    model: nn.Module  # the model itself, with the backbone's parameter names
    device: torch.device

    def accumulate(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The micro-batches of one step, on the device; gradients are reduced with the last one."""
        ...

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] to float32 logits [B, classes]."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, lr: float) -> Tensor:
        """Clips, steps the optimizer at this learning rate, clears gradients. Returns the norm before clipping."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What trains, and its optimizer state: everything that a resumed run needs besides the step."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None: ...


class EngineSection(Section):
    """What every engine says."""

    name: str

    def prepare(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        make_optimizer: MakeOptimizer,
        clip_norm: float | None,
        device: torch.device,
    ) -> Engine:
        """The engine around a model whose frozen parameters need no gradient."""
        raise NotImplementedError
