"""Sharded training by torch's FSDP2 (`fully_shard`; Zhao et al., 2023): each block is gathered while it computes.

frozen     shard: everything is sharded, one block whole at a time: the least memory, gathers of the base each step
           replicate: the base whole on every rank, only what trains is sharded: no gathers of the base
           offload: as shard, and the shards, gradients and the optimizer's state live in host memory

Trained scalars cannot be sharded; they are replicated. What products are computed in is `precision`'s to say: shards
are gathered as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from snell_dist import dist, meeting
from snell_dist.config import ConfigError, Problem
from snell_dist.engines import Engine, EngineSection, Job, Share, Work, rest
from snell_dist.engines._shares import BACKWARD, Visit, Wire, along, by_group, higher, states, step_temporaries, units
from snell_dist.footprint import OUTSIDE, Bytes, Category, Footprint, Phase, Weight, total

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from snell_dist.optim import Optim
    from snell_dist.precision import Precision


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

    @classmethod
    def variants(cls, ranks: int, nodes: int) -> list[Fsdp]:
        if ranks == 1:
            return [cls(name="fsdp", frozen="offload")]
        found = [cls(name="fsdp", frozen=frozen) for frozen in ("replicate", "shard", "offload")]
        return found + ([cls(name="fsdp", replicas=nodes)] if 1 < nodes < ranks else [])

    def check(self, precision: Precision, optim: Optim) -> None:
        if precision.frozen in ("int8", "nf4") and self.frozen != "replicate":
            message = "cannot be sharded: say engine.frozen=replicate, or float32 or bfloat16 here"
            raise ConfigError(Problem("precision.frozen", message, precision.frozen))
        if optim.name == "adamw8bit":
            raise ConfigError(Problem("optim.name", "cannot be sharded: use adamw or engine.name=ddp", optim.name))

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
            whole = {p for m in own for p in m.parameters(recurse=False) if not self._divides(p.shape, p.requires_grad)}
            for tensor in (*whole, *(b for m in own for b in m.buffers(recurse=False))):
                tensor.data = tensor.data.to(work.device)
            fully_shard(module, ignored_params=whole, **options)

        for block in work.blocks.values():
            shard(block, block.modules())
        shard(model, rest(work))
        groups = {name: list(block.parameters()) for name, block in work.blocks.items()}
        inside = {id(p) for parameters in groups.values() for p in parameters}
        groups["the rest"] = [p for p in model.parameters() if id(p) not in inside]
        loose = [p for p in model.parameters() if p.requires_grad and not self._divides(p.shape, p.requires_grad)]
        assert isinstance(model, torch.distributed.fsdp.FSDPModule)
        engine = TorchEngine(work, model, model.set_requires_gradient_sync, loose, groups)
        if loose:  # torch's multi-tensor loops take no mixture
            engine.one_by_one()
        return engine

    def _divides(self, shape: Sequence[int], trains: bool) -> bool:
        """Whether a parameter is sharded. A frozen one of a single row (timm's position embeddings) is not.

        It has nothing to divide: torch would give it to one rank, and gather as many such rows as there are ranks.
        """
        return len(shape) > 0 and (trains or (self.frozen != "replicate" and shape[0] > 1))

    def _check(self, work: Work) -> None:
        world = dist.world_size()
        if world % self.replicas:
            raise ConfigError(Problem("engine.replicas", f"must divide world_size {world}", self.replicas))
        if not work.blocks:
            raise ConfigError(Problem("engine.name", "the model has no blocks to shard; use ddp", self.name))
        self.check(work.precision, work.optim)

    def _mesh(self, device: Any) -> DeviceMesh:
        from torch.distributed.device_mesh import init_device_mesh

        meeting.ensure_group(device)
        world = dist.world_size()
        if self.replicas == 1:
            return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        shape = (self.replicas, world // self.replicas)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))

    def share(self, whole: Footprint, job: Job) -> Share:
        """As torch 2.14 has it; the unit of the rest is resharded like a block, since `reshard` is said for it, too.

        A gather fills one buffer and is copied out of it. In forward the buffer stays until the next one has been
        copied out of, in backward it goes, and the next block's is filled already. A block's whole gradients go when
        they are copied into the input of a reduce-scatter, which stays until the next block's.
        """
        ranks = job.ranks // self.replicas
        parts = {
            name: _Unit.of([w for w in own if self._divides(w.shape, w.trains)], ranks)
            for name, own in units(job).items()
        }
        local = sum(unit.local for unit in parts.values())
        sharded = [w for w in job.weights if self._divides(w.shape, w.trains)]
        trained = [w for group in by_group(w for w in job.weights if w.trains) for w in group]
        loose = [w for w in trained if not self._divides(w.shape, w.trains)]
        steps = [_padded(w, ranks) // ranks if self._divides(w.shape, w.trains) else w.bytes for w in trained]
        away = self.frozen == "offload" and job.device_type != "cpu"  # else the device is the host
        held = {
            Category.FROZEN: self._left(whole, Category.FROZEN, [w for w in sharded if not w.trains], ranks, away),
            Category.TRAINABLE: self._left(whole, Category.TRAINABLE, [w for w in sharded if w.trains], ranks, away),
            Category.OPTIMIZER: states(whole, total(trained), sum(steps)),
        }
        stepped = held[Category.OPTIMIZER]
        if away:
            held[Category.OPTIMIZER] = 0

        def change(visit: Visit) -> Bytes:
            if visit.moment.phase == Phase.STEP:
                mine = total(loose) + (0 if away else sum(unit.gradients for unit in parts.values()))
                return held | {
                    Category.GRADIENTS: mine,
                    Category.TEMPORARY: 0 if away else step_temporaries(visit, job, [w.bytes for w in trained], steps),
                }
            reduced = self._reduced(visit)
            done = sum(parts[name].trains for name in reduced)
            shards = 0 if away else sum(parts[name].gradients for name in reduced)
            sending = [name for name in reduced if parts[name].trains][-1:]
            here = held | {
                Category.GATHERED: self._gathered(visit, job, parts),
                Category.GRADIENTS: max(visit.gradients - done, 0) + shards,
                Category.COMMUNICATION: sum(parts[name].padded_trains for name in sending),
            }
            return higher(visit, here, {**here, **self._gathering(visit, here, parts)})

        host = local + stepped + sum(unit.gradients for unit in parts.values()) if away else 0
        return self._wire(whole, job, parts, loose).share(along(whole, job, change, held), host)

    def _left(self, whole: Footprint, category: Category, divided: list[Weight], ranks: int, away: bool) -> int:
        """What a rank holds of a category of parameters."""
        kept = 0 if away else sum(_padded(w, ranks) // ranks for w in divided)
        return whole.held.get(category, 0) - total(divided) + kept

    def _reduced(self, visit: Visit) -> list[str]:
        """The units whose gradients are reduced before this visit, in that order; the rest is the last one."""
        return [u for u in visit.entered[:-1] if u != OUTSIDE and u != visit.unit] if self._reduces(visit) else []

    @staticmethod
    def _reduces(visit: Visit) -> bool:
        return visit.last and visit.moment.phase in BACKWARD

    def _gathered(self, visit: Visit, job: Job, parts: dict[str, _Unit]) -> int:
        """Whole parameters at a visit, and the buffers that they are gathered in."""
        there = parts[OUTSIDE].padded
        blocks = [u for u in visit.entered if u != OUTSIDE]
        if visit.moment.phase == Phase.FORWARD:
            here = parts[blocks[-1]] if blocks else parts[OUTSIDE]
            kept = blocks if not self.reshard else blocks[-1:] if visit.unit != OUTSIDE else []
            return there + sum(parts[u].padded for u in kept) + here.buffer
        left = [u for u in job.blocks if u not in blocks]
        if not self.reshard:
            return there + sum(parts[u].padded for u in (*left, visit.unit) if u != OUTSIDE)
        ahead = parts[left[-1]].buffer if left else 0
        return there + (parts[visit.unit].padded if visit.unit != OUTSIDE else 0) + ahead

    def _gathering(self, visit: Visit, here: Bytes, parts: dict[str, _Unit]) -> Bytes:
        """What is otherwise when a unit has just been gathered: it has computed nothing, and its buffer is full.

        So is in forward the buffer before it; in backward none is full yet for the next one.
        """
        blocks, own = [u for u in visit.entered if u != OUTSIDE], parts[visit.unit]
        if visit.moment.phase == Phase.FORWARD and visit.unit != OUTSIDE and visit.enters:
            previous = parts[blocks[-2]] if len(blocks) > 1 else parts[OUTSIDE]
            gathered = here[Category.GATHERED] + previous.buffer
        elif visit.moment.phase in BACKWARD and self.reshard and (visit.enters if blocks else visit.before is None):
            gathered = parts[OUTSIDE].padded + own.buffer + (own.padded if visit.unit != OUTSIDE else 0)
        else:
            return {}
        start = visit.moment.start
        return {
            **{c: start.get(c, 0) for c in (Category.ACTIVATIONS, Category.ADAPTER, Category.TEMPORARY)},
            Category.GRADIENTS: max(here[Category.GRADIENTS] - visit.gradients + start.get(Category.GRADIENTS, 0), 0),
            Category.GATHERED: gathered,
        }

    def _wire(self, whole: Footprint, job: Job, parts: dict[str, _Unit], loose: list[Weight]) -> Wire:
        ranks, wire = job.ranks // self.replicas, Wire(job)
        backward = {m.block if m.block in parts else OUTSIDE for m in whole.moments if m.phase in BACKWARD}
        for name, unit in parts.items():
            again = self.reshard and name in backward
            wire.gather(unit.padded, ranks, times=job.micro_batches * (2 if again else 1))
            wire.gather(unit.padded_trains, ranks)
            wire.all_reduce(unit.gradients, self.replicas, apart=ranks)
        for weight in loose:
            wire.all_reduce(weight.bytes, job.ranks)
        return wire


@dataclass(frozen=True)
class _Unit:
    """Bytes of what is sharded together among `ranks`. Each parameter is padded on dim 0 to a multiple of them."""

    ranks: int
    trains: int
    padded: int
    padded_trains: int

    @classmethod
    def of(cls, weights: list[Weight], ranks: int) -> _Unit:
        trained = [w for w in weights if w.trains]
        return cls(ranks, total(trained), *(sum(_padded(w, ranks) for w in some) for some in (weights, trained)))

    @property
    def local(self) -> int:
        return self.padded // self.ranks

    @property
    def gradients(self) -> int:
        """Of a rank's part."""
        return self.padded_trains // self.ranks

    @property
    def buffer(self) -> int:
        """That a gather fills; one rank alone gathers nothing."""
        return self.padded if self.ranks > 1 else 0


def _padded(weight: Weight, ranks: int) -> int:
    rows = weight.shape[0]
    return -(-rows // ranks) * ranks * (weight.bytes // rows)
