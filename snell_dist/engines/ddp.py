"""Replicated training: one process, or many under torch's DistributedDataParallel.

Only what trains has gradients, so only it is in DDP's buckets and on the wire.
"""

from __future__ import annotations

import warnings
from typing import Literal

from snell_dist import dist
from snell_dist.engines import Engine, EngineSection, Job, Share, Work
from snell_dist.engines._shares import Visit, Wire, along
from snell_dist.footprint import Bytes, Category, Footprint, Phase, total

MIB = 2**20
MOST_MIB = 25.0  # of a bucket, DDP's own
BUCKETS = 8  # so many at least, that are reduced while backward goes on


class Ddp(EngineSection):
    name: Literal["ddp"]

    @classmethod
    def variants(cls, ranks: int, nodes: int) -> list[Ddp]:
        return [cls(name="ddp")]

    def prepare(self, work: Work) -> Engine:
        from torch.nn.parallel import DistributedDataParallel

        from snell_dist.engines._torch import TorchEngine

        model = work.model.to(work.device)
        if dist.world_size() == 1:
            return TorchEngine(work, model)
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # its heir syncs at init
        trains = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        # gradient_as_bucket_view spares a second copy of every gradient; buffers are the same on every rank already.
        ddp = DistributedDataParallel(
            model,
            bucket_cap_mb=bucket_mib(trains),
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )

        def reduce(last: bool) -> None:
            ddp.require_backward_grad_sync = last  # DDP decides at forward time

        return TorchEngine(work, ddp, reduce)

    def share(self, whole: Footprint, job: Job) -> Share:
        """Buckets are there for good, and gradients are views of them once they are reduced.

        Those of earlier micro-batches are tensors of their own, until the last one's backward.
        """
        if job.ranks == 1:
            return Share(whole, 0, 0, 0, 0)
        trains = total(job.weights, trains=True)

        def change(visit: Visit) -> Bytes:
            apart = job.micro_batches > 1 and visit.moment.phase != Phase.STEP
            gradients = visit.moment.bytes.get(Category.GRADIENTS, 0) if apart else 0
            return {Category.GRADIENTS: gradients + trains}

        wire, buckets = Wire(job), _buckets([w.bytes for w in reversed(job.weights) if w.trains])
        for size in buckets:
            wire.all_reduce(size, job.ranks)
        return wire.share(along(whole, job, change, {Category.GRADIENTS: trains}))


def bucket_mib(trains: int) -> float:
    """The size of a bucket, for so many bytes that train."""
    return min(max(trains / MIB / BUCKETS, 1.0), MOST_MIB)


def _buckets(sizes: list[int]) -> list[int]:
    """Bytes of each bucket: one is closed when it has reached the size."""
    limit, found = bucket_mib(sum(sizes)) * MIB, [0]
    for size in sizes:
        if found[-1] >= limit:
            found.append(0)
        found[-1] += size
    return found
