"""Ranks, devices, randomness and signals: what a process knows of itself and of the others.

One process is the group of size one: every function here works without a launcher.
"""

from __future__ import annotations

import logging
import os
import platform
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from snell_dist import network
from snell_dist.config import ConfigError, MachineError, Problem, UserError, first_line, trouble
from snell_dist.exits import Exit

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Store

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
INTERFACES = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
GROUP_TIMEOUT_S = 1800.0  # of a collective operation, torch's own
MEET_S = 300  # until all ranks have found each other: the slowest node imports torch from a busy file system
STOP_CHECK_S = 1.0
PR_SET_PDEATHSIG = 1
_at_end: set[Callable[[], None]] = set()


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes of this group on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1"))  # as DeepSpeed calls it


def pick_device(name: str) -> torch.device:
    """`auto` is the best there is; otherwise the named one. ConfigError where this machine lacks it."""
    import torch

    present = ["cpu"]
    if torch.backends.mps.is_available():
        present.insert(0, "mps")
    if torch.cuda.is_available():
        present.insert(0, "cuda")
    if name == "auto":
        name = present[0]
    if name not in present:
        raise ConfigError(Problem("train.device", f"this machine has none (present: {', '.join(present)})", name))
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def process_group(
    device: torch.device, timeout_s: float = GROUP_TIMEOUT_S, meet: Callable[[Store], None] = lambda store: None
) -> Iterator[None]:
    """Joins the launcher's process group, if there is one, and leaves it at the end.

    `meet` is called with the launcher's store before the group is made. UserError or MachineError where the ranks do
    not find each other.
    """
    import torch.distributed as torch_dist

    if world_size() > 1:
        end_with_parent()
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder: who was in which collective
        store = _store()
        meet(store)
        # gloo's own time-out does not cover the making of connections
        guard = threading.Timer(MEET_S, _unconnected)
        guard.start()
        try:
            torch_dist.init_process_group(
                _backend(device), store=store, rank=rank(), world_size=world_size(),
                timeout=timedelta(seconds=timeout_s),
            )  # fmt: skip
        except (ValueError, RuntimeError) as error:
            raise MachineError(f"{host()}: rank {rank()} cannot join the others: {first_line(error)}") from None
        finally:
            guard.cancel()
    try:
        yield
    finally:
        while _at_end:
            _at_end.pop()()
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()


def host() -> str:
    return platform.node()


def _store() -> Store:
    """The launcher's store, once the interface that leads to it is chosen."""
    import torch.distributed as torch_dist

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            f"launcher: WORLD_SIZE is {world_size()} but MASTER_ADDR and MASTER_PORT do not name the first rank's"
            " host and port (start with torchrun, or unset WORLD_SIZE)"
        ) from None
    where = f"MASTER_ADDR={address}"
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise MachineError(f"{host()}: {where}: the name is not known there: {error.strerror}") from None
    interface = network.interface_to(address)
    if interface is not None and world_size() > local_world_size():
        for name in INTERFACES:
            os.environ.setdefault(name, interface)
    if rank() and not network.reaches(address, port, MEET_S):
        raise MachineError(
            f"{host()}: rank {rank()} cannot reach {where} port {port} within {MEET_S} s: nothing listens there, or a"
            " firewall is between (rank 0 must run on that host)"
        )
    try:
        store, _, _ = next(torch_dist.rendezvous("env://", timeout=timedelta(seconds=MEET_S)))
    except (ValueError, RuntimeError) as error:
        if "EADDRINUSE" in str(error):
            said = f"{where} port {port} is in use on {host()}: end what listens there, or set another MASTER_PORT"
            raise UserError(said) from None
        raise MachineError(f"{host()}: {where} port {port}: {first_line(error)}") from None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's own store remembers earlier attempts. With several agents nothing tells attempts apart, since each
        # counts those that its own ranks ended: there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each a new store.
        store = torch_dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store


def _unconnected() -> None:
    print(
        f"snell: [rank {rank()}] {host()}: reached the first rank, but not all of the {world_size()} ranks within"
        f" {MEET_S} s: a firewall between the nodes, or the wrong interface"
        f" ({', '.join(f'{name}={os.environ[name]}' for name in INTERFACES if name in os.environ)})",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(Exit.MACHINE)


def launched_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def end_with_parent(by: int = signal.SIGTERM) -> None:
    """This process gets a signal when the one that started it dies: a rank saves and ends, and trains on for nobody."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)


def call_off() -> None:
    """Keeps torchrun from starting the ranks of this node again, where that would end the same way."""
    if launched_by_torchrun():
        with suppress(ProcessLookupError):
            os.kill(os.getppid(), signal.SIGTERM)


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


def leave(status: int) -> NoReturn:
    """Ends this process at once, when all is done and said.

    An ordinary end runs the destructors of gloo's threads, which now and then abort the process (one of about 40,
    "terminate called without an active exception"), and the launcher then calls a finished run failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def barrier() -> None:
    if world_size() > 1:
        import torch.distributed as torch_dist

        torch_dist.barrier()


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if world_size() == 1:
        return value
    import torch.distributed as torch_dist

    box = [value]
    torch_dist.broadcast_object_list(box)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in the order of ranks."""
    if world_size() == 1:
        return [value]
    import torch.distributed as torch_dist

    box: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(box, value)
    return box


def first_does(action: Callable[[], T]) -> T:
    """Rank 0 acts, and all get its result, or all raise its UserError, or the like for an OSError."""
    told: Any = None
    error: UserError | None = None
    if rank() == 0:
        try:
            result = action()
            told = (result, None)
        except (UserError, OSError) as raised:
            error = raised if isinstance(raised, UserError) else trouble(raised.filename, raised)
            told = (None, (str(error), MachineError if isinstance(error, MachineError) else UserError))
    result, problem = broadcast_object(told)
    if error is not None:
        raise error from None
    if problem is not None:
        said, kind = problem
        raise kind(said)
    return result


def all_agree(value: bool) -> bool:
    """Whether it is so on every rank."""
    return all(gather_objects(value))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if world_size() > 1:
        import torch.distributed as torch_dist

        torch_dist.all_reduce(tensor)
    return tensor


def gather_rows(tensor: Tensor) -> Tensor:
    """Equally many rows [B, ...] of every rank, in the order of ranks [world_size * B, ...]; without gradient."""
    if world_size() == 1:
        return tensor.detach().clone()
    import torch
    import torch.distributed as torch_dist

    pieces = [torch.empty_like(tensor) for _ in range(world_size())]
    torch_dist.all_gather(pieces, tensor.detach().contiguous())
    return torch.cat(pieces)


def random_state(device: torch.device) -> list[Tensor]:
    """Where torch's generators stand, to draw the same again."""
    import torch

    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    import torch

    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def seed_everything(*numbers: int) -> None:
    """Makes every generator a function of these numbers.

    A step seeds with (seed, step, rank), so randomness is no state: a resumed run draws what the
    uninterrupted one drew, with nothing to save.
    """
    import numpy as np
    import torch

    state = np.random.SeedSequence(numbers).generate_state(2)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))
    np.random.seed(state[0])
    random.seed(int(state[1]))


class StopRequest:
    """Remembers SIGTERM, SIGUSR1 and Ctrl-C until the end of the step; a second Ctrl-C stops at once.

    `file`: so does its being touched, which reaches a run under any launcher, and on any node.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.received: int | None = None
        self._interrupts = 0  # a parent may pass Ctrl-C on as SIGTERM, which may come first
        self._file, self._checked, self._before = file, time.monotonic(), self._touched(file)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        old = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.received = number

    @staticmethod
    def _touched(file: Path | None) -> int:
        try:
            return file.stat().st_mtime_ns if file is not None else 0
        except OSError:
            return 0

    def _look(self) -> None:
        now = time.monotonic()
        if rank() == 0 and self._file is not None and now - self._checked > STOP_CHECK_S:
            self._checked = now
            if self._touched(self._file) > self._before:
                self.received = signal.SIGUSR1

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer, after the same step."""
        self._look()
        if world_size() == 1:
            return self.received is not None
        import torch

        return bool(sum_over_ranks(torch.tensor(int(self.received is not None), device=device)))
