"""Replicated training: one process, or many under torch's DistributedDataParallel.

Only what trains has gradients, so only it is in DDP's buckets and on the wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from snell_dist import dist
from snell_dist.config import UserError
from snell_dist.engines import EngineSection, Work

if TYPE_CHECKING:
    from torch import Tensor

    from snell_dist.data import Batch


class Ddp(EngineSection):
    name: Literal["ddp"]

    def prepare(self, work: Work) -> DdpEngine:
        return DdpEngine(work)


class DdpEngine:
    """See `Engine` for the contract."""

    def __init__(self, work: Work) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self.device = work.device
        self.model = work.model.to(work.device)
        self._clip_norm = float("inf") if work.clip_norm is None else work.clip_norm
        self._precision = work.precision
        # gradient_as_bucket_view spares a second copy of every gradient; buffers are the same on every rank already.
        options: dict[str, Any] = {"gradient_as_bucket_view": True, "broadcast_buffers": False}
        self._ddp = DistributedDataParallel(self.model, **options) if dist.world_size() > 1 else None
        self._named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._remembered = {name: self.model.get_buffer(name) for name in work.remembered}
        self._optimizer = work.make_optimizer(self._named.items())

    def accumulate(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._ddp is not None:
                self._ddp.require_backward_grad_sync = batch.last  # DDP decides at forward time
            yield batch.to(self.device)

    def forward(self, *inputs: Any) -> Any:
        import torch
        from torch.utils._pytree import tree_map_only

        with self._precision.autocast(self.device):
            outputs = (self._ddp or self.model)(*inputs)
        return tree_map_only(torch.Tensor, lambda t: t.float(), outputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> Tensor:
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self._named.values(), self._clip_norm)
        self._optimizer.step()
        return norm

    def clear(self) -> None:
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        import torch

        state = {f"model/{name}": tensor.detach() for name, tensor in self._kept().items()}
        for name, parameter in self._named.items():
            for key, value in self._optimizer.state[parameter].items():
                if value is not None:  # SGD before its first step
                    state[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        import torch

        mine = {f"model/{name}" for name in self._kept()}
        theirs = {key for key in state if key.startswith("model/")}
        if mine != theirs:
            raise UserError(f"checkpoint: has {len(theirs)} tensors, this configuration {len(mine)}: another run's?")
        with torch.no_grad():
            for name, tensor in self._kept().items():
                tensor.copy_(state[f"model/{name}"])
        for name, parameter in self._named.items():
            prefix = f"optimizer/{name}/"
            self._optimizer.state[parameter] = {
                # AdamW keeps its step count on the CPU, whatever the device.
                key.removeprefix(prefix): value.clone().to(self.device if value.ndim else "cpu")
                for key, value in state.items()
                if key.startswith(prefix)
            }

    def _kept(self) -> dict[str, Tensor]:
        return {**self._named, **self._remembered}
