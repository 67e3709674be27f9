"""Replicated training: one process, or many under torch's DistributedDataParallel.

Only what trains has gradients, so only it is in DDP's buckets and on the wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from snell_dist import dist
from snell_dist.config import UserError
from snell_dist.engines import EngineSection

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from snell_dist.data import Batch
    from snell_dist.engines import MakeOptimizer


class Ddp(EngineSection):
    name: Literal["ddp"]
    autocast: Literal["none", "bf16"] = Field(
        "none", description="dtype of the forward's products; weights stay as they are"
    )

    def prepare(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        make_optimizer: MakeOptimizer,
        clip_norm: float | None,
        device: torch.device,
    ) -> DdpEngine:
        return DdpEngine(model, make_optimizer, clip_norm, device, self.autocast == "bf16")


class DdpEngine:
    """See `Engine` for the contract."""

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        clip_norm: float | None,
        device: torch.device,
        autocast: bool,
    ) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self.device = device
        self.model = model.to(device)
        self._clip_norm = float("inf") if clip_norm is None else clip_norm
        self._autocast = autocast
        # gradient_as_bucket_view spares a second copy of every gradient.
        self._ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.world_size() > 1 else None
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer = make_optimizer(self._named.items())

    def accumulate(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._ddp is not None:
                self._ddp.require_backward_grad_sync = batch.last  # DDP decides at forward time
            yield batch.to(self.device)

    def forward(self, images: Tensor) -> Tensor:
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return (self._ddp or self.model)(images).float()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self._named.values(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def state(self) -> dict[str, Tensor]:
        import torch

        state = {f"model/{name}": p.detach() for name, p in self._named.items()}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state[parameter].items():
                if value is not None:  # SGD before its first step
                    state[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        import torch

        mine = {f"model/{name}" for name in self._named}
        theirs = {key for key in state if key.startswith("model/")}
        if mine != theirs:
            raise UserError(f"checkpoint: trains {len(theirs)} tensors, this configuration {len(mine)}: another run's?")
        for name, parameter in self._named.items():
            with torch.no_grad():
                parameter.copy_(state[f"model/{name}"])
            prefix = f"optimizer/{name}/"
            self._optimizer.state[parameter] = {
                # AdamW keeps its step count on the CPU, whatever the device.
                key.removeprefix(prefix): value.clone().to(self.device if value.ndim else "cpu")
                for key, value in state.items()
                if key.startswith(prefix)
            }
