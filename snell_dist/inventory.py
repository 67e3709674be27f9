"""What a model is made of, parameter by parameter, taken before an engine divides it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

MIB = 2**20


@dataclass(frozen=True)
class Entry:
    """One parameter. `numbers`: of the matrix that it stands for; two of a packed one may share a byte."""

    kind: str  # such as AdaptedLinear.weight
    dtype: str
    numbers: int
    bytes: int
    trains: bool


def inventory(model: nn.Module, trainable: Iterable[str]) -> dict[str, Entry]:
    """By parameter name, in the model's order."""
    trains, found = set(trainable), {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        packing = getattr(module, "packing", None) if leaf == "weight" else None
        found[name] = Entry(
            kind=f"{type(module).__name__}.{leaf}",
            dtype=str(parameter.dtype).removeprefix("torch."),
            numbers=parameter.numel() if packing is None else math.prod(packing.shape),
            bytes=parameter.nbytes,
            trains=name in trains,
        )
    return found


def numbers(entries: Mapping[str, Entry], trains: bool | None = None) -> int:
    """Of all parameters, or of those that train or do not."""
    return sum(e.numbers for e in entries.values() if trains in (None, e.trains))


def table(entries: Mapping[str, Entry]) -> list[str]:
    """One line for each kind of parameter, dtype, and whether it trains."""
    rows: dict[tuple[bool, str, str], list[int]] = {}
    for e in entries.values():
        row = rows.setdefault((e.trains, e.kind, e.dtype), [0, 0, 0])
        for i, amount in enumerate((1, e.numbers, e.bytes)):
            row[i] += amount
    ordered = sorted(rows.items(), key=lambda item: (not item[0][0], -item[1][1]))
    return [
        f"  {'trains' if trains else 'frozen'}  {kind:32} {dtype:9} {count:5} tensors {parameters:15,} parameters"
        f" {size / MIB:10.2f} MiB"
        for (trains, kind, dtype), (count, parameters, size) in ordered
    ]
