"""How the ranks that a launcher started find each other: its store, the interface that leads there, and their group."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from snell_dist import dist, network
from snell_dist.config import MachineError, UserError, first_line
from snell_dist.exits import Exit

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

INTERFACES = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
GROUP_TIMEOUT_S = 1800.0  # of a collective operation, torch's own
MEET_S = 300  # until all ranks have found each other: the slowest node imports torch from a busy file system
_at_end: set[Callable[[], None]] = set()


@contextmanager
def process_group(
    device: torch.device, timeout_s: float = GROUP_TIMEOUT_S, meet: Callable[[Store], None] = lambda store: None
) -> Iterator[None]:
    """Joins the launcher's process group, if there is one, and leaves it at the end.

    `meet` is called with the launcher's store before the group is made. UserError or MachineError where the ranks do
    not find each other.
    """
    import torch.distributed as torch_dist

    if dist.world_size() > 1:
        dist.end_with_parent()
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder: who was in which collective
        store = _store()
        meet(store)
        # gloo's own time-out does not cover the making of connections
        guard = threading.Timer(MEET_S, _unconnected)
        guard.start()
        try:
            torch_dist.init_process_group(
                _backend(device), store=store, rank=dist.rank(), world_size=dist.world_size(),
                timeout=timedelta(seconds=timeout_s),
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise MachineError(f"{_who()} cannot join the others: {first_line(error)}") from None
        finally:
            guard.cancel()
    try:
        yield
    finally:
        while _at_end:
            _at_end.pop()()
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()


def _store() -> Store:
    """The launcher's store, once the interface that leads to it is chosen."""
    import torch.distributed as torch_dist

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            f"launcher: WORLD_SIZE is {dist.world_size()} but MASTER_ADDR and MASTER_PORT do not name the first rank's"
            " host and port (start with torchrun, or unset WORLD_SIZE)"
        ) from None
    where = f"MASTER_ADDR={address}"
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise MachineError(f"{dist.host()}: {where}: the name is not known there: {error.strerror}") from None
    interface = network.interface_to(address)
    if interface is not None and dist.world_size() > dist.local_world_size():
        for name in INTERFACES:
            os.environ.setdefault(name, interface)
    if dist.rank() and not network.reaches(address, port, MEET_S):
        raise MachineError(
            f"{_who()} cannot reach {where} port {port} within {MEET_S} s: nothing listens there, or a firewall is"
            " between (rank 0 must run on that host)"
        )
    try:
        store, _, _ = next(torch_dist.rendezvous("env://", timeout=timedelta(seconds=MEET_S)))
    except (ValueError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            said = f"{where} port {port} is in use on {dist.host()}: end what listens there, or set another MASTER_PORT"
            raise UserError(said) from None
        raise MachineError(f"{dist.host()}: {where} port {port}: {first_line(error)}") from None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's own store remembers earlier attempts. With several agents nothing tells attempts apart, since each
        # counts those that its own ranks ended: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each a new store.
        store = torch_dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


def _who() -> str:
    return f"{dist.host()}: rank {dist.rank()}"


def _unconnected() -> None:
    print(
        f"snell: {_who()} reached the first rank, but not all of the {dist.world_size()} ranks within {MEET_S} s:"
        " a firewall between the nodes, or the wrong interface"
        f" ({', '.join(f'{name}={os.environ[name]}' for name in INTERFACES if name in os.environ)})",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(Exit.MACHINE)


def at_end(action: Callable[[], None]) -> None:
    """To be done, once, before the process group is left: a library forgets what it keeps of it."""
    _at_end.add(action)


def ensure_group(device: torch.device) -> None:
    """A group of one where no launcher made any, for engines that want one."""
    import torch.distributed as torch_dist

    if not torch_dist.is_initialized():
        torch_dist.init_process_group(_backend(device), store=torch_dist.HashStore(), rank=0, world_size=1)


def _backend(device: torch.device) -> str:
    """Checkpoints are written from host memory while training goes on, so there is always a gloo beside NCCL."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
