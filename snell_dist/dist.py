"""Ranks, devices, randomness and signals: what a process knows of itself and of the others.

One process is the group of size one: every function here works without a launcher.
"""

from __future__ import annotations

import logging
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from snell_dist.config import ConfigError, MachineError, Problem, UserError, trouble

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_CHECK_S = 1.0
PR_SET_PDEATHSIG = 1
_alone = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within, this thread takes its process for the only one: what it computes is no matter of the other ranks."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def rank() -> int:
    return 0 if _alone.get() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return 1 if _alone.get() else int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Processes of this group on this machine."""
    return (
        1 if _alone.get() else int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", "1"))
    )  # as DeepSpeed calls it


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


def host() -> str:
    return platform.node()


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
