"""Sharded training by torch's FSDP2 (`fully_shard`; Zhao et al., 2023): each block is gathered while it computes.

frozen     shard: everything is sharded, one block whole at a time: the least memory, gathers of the base each step
           replicate: the base whole on every rank, only what trains is sharded: no gathers of the base
           offload: as shard, and the shards, gradients and the optimizer's state live in host memory

Trained scalars cannot be sharded; they are replicated. What products are computed in is `precision`'s to say: shards
are gathered as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from snell_dist import dist, meeting
from snell_dist.config import ConfigError, Problem
from snell_dist.engines import Engine, EngineSection, Work, rest

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


class Fsdp(EngineSection):
    name: Literal["fsdp"]
    frozen: Literal["shard", "replicate", "offload"] = Field("shard", description="where the frozen base is")
    reshard: bool = Field(True, description="free a block after its forward and gather it again for backward")
    replicas: int = Field(
        1, ge=1, description="groups of ranks that each hold the whole model in shards (HSDP); such as the nodes"
    )

    @property
    def shards(self) -> bool:
        return True

    def prepare(self, work: Work) -> Engine:
        import torch
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        from snell_dist.engines._torch import TorchEngine

        self._check(work)
        model, cuda = work.model, work.device.type == "cuda"
        options: dict[str, Any] = {
            "mesh": self._mesh(work.device),
            "reshard_after_forward": self.reshard,
            "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if self.frozen == "offload" else OffloadPolicy(),
        }
        place = torch.device("cpu") if self.frozen == "offload" else work.device

        def shard(module: nn.Module, own: Iterable[nn.Module]) -> None:
            own = list(own)
            work.fill(own, place)
            whole = {p for m in own for p in m.parameters(recurse=False) if not self._divides(p)}
            for tensor in (*whole, *(b for m in own for b in m.buffers(recurse=False))):
                tensor.data = tensor.data.to(work.device)
            fully_shard(module, ignored_params=whole, **options)

        for block in work.blocks.values():
            shard(block, block.modules())
        shard(model, rest(work))
        groups = {name: list(block.parameters()) for name, block in work.blocks.items()}
        inside = {id(p) for parameters in groups.values() for p in parameters}
        groups["the rest"] = [p for p in model.parameters() if id(p) not in inside]
        loose = [p for p in model.parameters() if p.requires_grad and not self._divides(p)]
        assert isinstance(model, torch.distributed.fsdp.FSDPModule)
        engine = TorchEngine(work, model, model.set_requires_gradient_sync, loose, groups)
        if loose:  # torch's multi-tensor loops take no mixture
            engine.one_by_one()
        return engine

    def _divides(self, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 0 and (parameter.requires_grad or self.frozen != "replicate")

    def _check(self, work: Work) -> None:
        world = dist.world_size()
        if world % self.replicas:
            raise ConfigError(Problem("engine.replicas", f"must divide world_size {world}", self.replicas))
        if not work.blocks:
            raise ConfigError(Problem("engine.name", "the model has no blocks to shard; use ddp", self.name))
        if work.precision.frozen in ("int8", "nf4") and self.frozen != "replicate":
            message = "cannot be sharded: say engine.frozen=replicate, or float32 or bfloat16 here"
            raise ConfigError(Problem("precision.frozen", message, work.precision.frozen))
        if work.optim.name == "adamw8bit":
            raise ConfigError(Problem("optim.name", "cannot be sharded: use adamw or engine.name=ddp", work.optim.name))

    def _mesh(self, device: Any) -> DeviceMesh:
        from torch.distributed.device_mesh import init_device_mesh

        meeting.ensure_group(device)
        world = dist.world_size()
        if self.replicas == 1:
            return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        shape = (self.replicas, world // self.replicas)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
