"""Ranks without a launcher: forked from a process that has imported everything, which takes longer than their steps."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing import start_processes

IMPORTED = [
    "open_clip", "pytest", "sklearn.datasets", "snell_dist.job", "timm", "torchmetrics.functional.classification",
]  # fmt: skip
multiprocessing.set_forkserver_preload(IMPORTED)


def together(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(*arguments)` of a module's own on so many ranks at once; what one of them raises is raised here."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    start_processes(_begin, (ranks, port, work, arguments), ranks, start_method="forkserver")


def _begin(rank: int, ranks: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """With the names that torchrun would give it."""
    from snell_dist import dist

    number, many = str(rank), str(ranks)
    os.environ |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": many, "LOCAL_WORLD_SIZE": many}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    work(*arguments)
    dist.leave(0)
