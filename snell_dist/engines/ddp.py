"""Replicated training: one process, or many under torch's DistributedDataParallel.

Only what trains has gradients, so only it is in DDP's buckets and on the wire.
"""

from __future__ import annotations

import warnings
from typing import Literal

from snell_dist import dist
from snell_dist.engines import Engine, EngineSection, Work

MIB = 2**20
MOST_MIB = 25.0  # of a bucket, DDP's own
BUCKETS = 8  # so many at least, that are reduced while backward goes on


class Ddp(EngineSection):
    name: Literal["ddp"]

    def prepare(self, work: Work) -> Engine:
        from torch.nn.parallel import DistributedDataParallel

        from snell_dist.engines._torch import TorchEngine

        model = work.model.to(work.device)
        if dist.world_size() == 1:
            return TorchEngine(work, model)
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # its heir syncs at init
        trains = sum(p.nbytes for p in model.parameters() if p.requires_grad) / MIB
        # gradient_as_bucket_view spares a second copy of every gradient; buffers are the same on every rank already.
        ddp = DistributedDataParallel(
            model,
            bucket_cap_mb=min(max(trains / BUCKETS, 1.0), MOST_MIB),
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )

        def reduce(last: bool) -> None:
            ddp.require_backward_grad_sync = last  # DDP decides at forward time

        return TorchEngine(work, ddp, reduce)
