"""What the device itself says of its memory, beside the ledger: CUDA's allocator, and the driver by nvidia-ml-py."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Figures:
    """Bytes. None where this device, or its driver, does not tell.

    allocated: of live tensors; reserved: that the allocator holds of the device, free pieces among them; process: of
    this process by the driver, CUDA's context and the libraries' own memory among it; used: of the whole device, by
    everybody.
    """

    allocated: int | None = None
    allocated_peak: int | None = None
    reserved: int | None = None
    reserved_peak: int | None = None
    process: int | None = None
    used: int | None = None
    total: int | None = None

    @property
    def fragmentation(self) -> int | None:
        """What is reserved, and is of no tensor."""
        return None if self.reserved is None or self.allocated is None else self.reserved - self.allocated


def figures(device: torch.device) -> Figures:
    """As they are now; peaks since `torch.cuda.reset_peak_memory_stats`. On the CPU nothing is told."""
    if device.type != "cuda":
        return Figures()
    said = torch.cuda.memory_stats(device)
    process, used, total = _by_driver(device)
    return Figures(
        said.get("allocated_bytes.all.current"),
        said.get("allocated_bytes.all.peak"),
        said.get("reserved_bytes.all.current"),
        said.get("reserved_bytes.all.peak"),
        process,
        used,
        total or torch.cuda.get_device_properties(device).total_memory,
    )


def snapshot(file: Path) -> Path | None:
    """Writes what CUDA's allocator holds, for https://pytorch.org/memory_viz; with the history where it was recorded.

    Returns the file, or None where there is no CUDA or it could not be written.
    """
    if not torch.cuda.is_available():
        return None
    with suppress(OSError, RuntimeError):
        torch.cuda.memory._dump_snapshot(str(file))
        return file
    return None


def _by_driver(device: torch.device) -> tuple[int | None, int | None, int | None]:
    """This process's bytes, everybody's, and all there are."""
    import pynvml

    process = used = total = None
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        # by UUID, since CUDA_VISIBLE_DEVICES renumbers
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        about = pynvml.nvmlDeviceGetMemoryInfo(handle)
        used, total = int(about.used), int(about.total)
        # the driver's numbers of processes are the machine's; in a container they are not ours
        mine = [p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        process = next((int(size) for size in mine if size is not None), None)
    return process, used, total
