"""How a sharded model begins on many ranks: one rank of each node builds it, the others get it a block at a time.

So host memory holds one whole model a node, however many ranks there are, and a rank's device one block at most
beside its shards. Where nothing is sharded every rank builds its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from snell_dist import dist
from snell_dist.config import UserError


class Start:
    """`reads`: this rank has the model's numbers; the others have its shapes, on the meta device, until `fill`."""

    def __init__(self, shared: bool) -> None:
        self._shared = shared and dist.world_size() > 1
        node = dist.local_world_size() if dist.world_size() % dist.local_world_size() == 0 else dist.world_size()
        self._source = dist.rank() // node * node
        self.reads = not self._shared or dist.rank() == self._source
        self._group: Any = None
        if self._shared and node < dist.world_size():
            self._group, _ = torch.distributed.new_subgroups(node)

    def building(self) -> AbstractContextManager[Any]:
        """Where the model is made."""
        return nullcontext() if self.reads else torch.device("meta")

    def agree(self, problem: UserError | None) -> None:
        """Raises a reader's problem on every rank, so that nobody waits for a model that will not come."""
        said = [p for p in dist.gather_objects(None if problem is None else str(problem)) if p]
        if problem is not None:
            raise problem
        if said:
            raise UserError(said[0])

    def told(self, value: Any) -> Any:
        """The first reader's value."""
        return dist.broadcast_object(value) if self._shared else value

    @torch.no_grad()
    def fill(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        """Brings the modules' own parameters and buffers to the device, with the reader's numbers."""
        for module in modules:
            if self.reads:
                module._apply(lambda t: t.to(device), recurse=False)
            else:
                module.to_empty(device=device, recurse=False)
            if self._shared:
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    torch.distributed.broadcast(tensor.data, self._source, group=self._group)
