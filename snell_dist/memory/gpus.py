"""GPUs by name: what their memory is, and how fast they multiply and talk, by their makers' data sheets.

Memory is what the driver reports in all, which is less than the name says where error correction takes a part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from snell_dist.config import UserError, nearest

MIB, GIB = 2**20, 2**30
UNITS = {"KiB": 2**10, "MiB": MIB, "GiB": GIB, "TiB": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class Gpu:
    """memory: bytes; half, single: dense 10^12 operations a second (bfloat16 or float16, float32 or TF32);
    link: 10^9 bytes a second that one GPU sends to another of its node."""

    name: str
    memory: int
    half: float
    single: float
    link: float
    capability: tuple[int, int]  # CUDA's compute capability

    @property
    def bfloat16(self) -> bool:
        """Whether it has units for it."""
        return self.capability >= (8, 0)


PCIE4, PCIE5 = 25.0, 50.0
KNOWN = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", 15360 * MIB, 65, 8.1, 12, (7, 5)),
        Gpu("v100-16gb", 16384 * MIB, 125, 15.7, 150, (7, 0)),
        Gpu("v100-32gb", 32768 * MIB, 125, 15.7, 150, (7, 0)),
        Gpu("rtx3090", 24576 * MIB, 71, 35.6, PCIE4, (8, 6)),
        Gpu("rtx4090", 24564 * MIB, 165, 82.6, PCIE4, (8, 9)),
        Gpu("rtx5090", 32607 * MIB, 209, 104, PCIE5, (12, 0)),
        Gpu("a10", 23028 * MIB, 125, 62.5, PCIE4, (8, 6)),
        Gpu("l4", 23034 * MIB, 121, 60, PCIE4, (8, 9)),
        Gpu("a40", 46068 * MIB, 150, 75, PCIE4, (8, 6)),
        Gpu("a6000", 49140 * MIB, 155, 77, PCIE4, (8, 6)),
        Gpu("l40s", 46068 * MIB, 362, 183, PCIE4, (8, 9)),
        Gpu("a100-40gb", 40960 * MIB, 312, 156, 300, (8, 0)),
        Gpu("a100", 81920 * MIB, 312, 156, 300, (8, 0)),
        Gpu("h100", 81559 * MIB, 989, 495, 450, (9, 0)),
        Gpu("h100-pcie", 81559 * MIB, 756, 378, PCIE5, (9, 0)),
        Gpu("gh200", 97871 * MIB, 989, 495, 450, (9, 0)),
        Gpu("h200", 143771 * MIB, 989, 495, 450, (9, 0)),
        Gpu("b200", 183359 * MIB, 2250, 1125, 900, (10, 0)),
    )
}
UNNAMED = "a100"  # whose speeds stand for those of a GPU that only its memory is known of


def find(name: str | None, memory: str | None) -> Gpu:
    """By name, by memory such as 80GiB, or by both: then the memory is what is said.

    UserError for an unknown name, or a size that says no unit.
    """
    if name is None and memory is None:
        raise UserError("--gpu-memory: how much is there? Say it, such as --gpu-memory 80GiB, or --gpu h100")
    if name is not None and name.lower() not in KNOWN:
        others = f"(allowed: {', '.join(KNOWN)}; of any other say --gpu-memory, such as 80GiB)"
        raise UserError(f"--gpu {name}: unknown{nearest(name.lower(), KNOWN)} {others}")
    gpu = replace(KNOWN[UNNAMED], name="GPU") if name is None else KNOWN[name.lower()]
    return gpu if memory is None else replace(gpu, memory=parse_size(memory, "--gpu-memory"))


def parse_size(text: str, key: str) -> int:
    """Bytes, of such as 80GiB or 500 MB. UserError naming `key` where it says no unit, or nothing."""
    found = SIZE.fullmatch(text.strip())
    units = {unit.lower(): size for unit, size in UNITS.items()}
    if not found or found[2].lower() not in units or not float(found[1]):
        number = found[1] if found and float(found[1]) else "80"
        why = "has no unit" if found and not found[2] else "is no size"
        raise UserError(f"{key} {text}: {why} (allowed: {', '.join(UNITS)}); such as {number}GiB")
    return int(float(found[1]) * units[found[2].lower()])


def in_words(size: float) -> str:
    """Bytes, readably: 512 B, 3.2 MiB, 1.25 GiB."""
    for unit in ("GiB", "MiB", "KiB"):
        if abs(size) >= UNITS[unit]:
            return f"{size / UNITS[unit]:.2f} {unit}" if unit == "GiB" else f"{size / UNITS[unit]:.1f} {unit}"
    return f"{size:.0f} B"
