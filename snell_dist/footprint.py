"""What both a recording and a prediction are: the live bytes of one training step along its time line.

Bytes are those of storages: a view costs nothing, and what two tensors share is counted once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

OUTSIDE = ""  # the block of what belongs to no module


class Category(str, Enum):
    """What a storage is for, at the moment of which one speaks."""

    FROZEN = "frozen parameters"
    TRAINABLE = "trainable parameters"
    BUFFERS = "buffers"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer state"
    INPUTS = "inputs"  # the batch
    ACTIVATIONS = "saved activations"  # made in a forward (or its recomputation), and kept for backward
    ADAPTER = "adapter temporaries"  # made and dropped within an adapted layer
    TEMPORARY = "other temporaries"
    GATHERED = "gathered shards"  # whole parameters of a sharded model, while they are there
    COMMUNICATION = "communication"  # buckets and messages

    @property
    def stays(self) -> bool:
        """Whether it is there between steps."""
        return self in HELD


HELD = (Category.FROZEN, Category.TRAINABLE, Category.BUFFERS, Category.OPTIMIZER)
Bytes = Mapping[Category, int]


class Phase(str, Enum):
    FORWARD = "forward"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"  # a forward within backward
    STEP = "step"  # clipping, the optimizer


@dataclass(frozen=True)
class Moment:
    """The highest moment of one visit: of the time between entering a block (in a phase) and entering another."""

    phase: Phase
    block: str  # blocks.3, visual.blocks.0, patch_embed, ...; OUTSIDE for what is in no module
    module: str  # the innermost module at work
    bytes: Bytes  # live, by category
    start: Bytes = field(default_factory=dict)  # the same when the visit began

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Owner:
    """Bytes that one module's tensors hold at the peak."""

    module: str
    block: str
    category: Category
    bytes: int


@dataclass(frozen=True)
class Footprint:
    """One step of one process. `moments`: in the order of time; `owners`: at the peak, the largest first."""

    moments: list[Moment]
    held: Bytes  # between steps
    owners: list[Owner]

    @property
    def peak(self) -> Moment:
        """The first of the highest moments."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def peak_bytes(self) -> int:
        return self.peak.total

    @property
    def by_block(self) -> dict[str, dict[Category, int]]:
        """At the peak."""
        found: dict[str, dict[Category, int]] = {}
        for owner in self.owners:
            block = found.setdefault(owner.block, {})
            block[owner.category] = block.get(owner.category, 0) + owner.bytes
        return found

    def highest(self, phase: Phase) -> Moment | None:
        """The highest moment of a phase, if it was there."""
        return max((m for m in self.moments if m.phase == phase), key=lambda moment: moment.total, default=None)

    def followed_by(self, steps: list[Moment], owners: list[Owner]) -> Footprint:
        """With these moments of an optimizer step, and who holds what at the highest of them."""
        higher = max(moment.total for moment in steps) > self.peak_bytes
        return Footprint([*self.moments, *steps], self.held, owners if higher else self.owners)

    def as_json(self) -> dict[str, Any]:
        return {
            "peak_bytes": self.peak_bytes,
            "categories": plain(self.peak.bytes),
            "peak": {"phase": self.peak.phase.value, "block": self.peak.block, "module": self.peak.module},
            "held": plain(self.held),
            "moments": [
                {
                    "phase": m.phase.value,
                    "block": m.block,
                    "module": m.module,
                    "bytes": _words(m.bytes),
                    "start": _words(m.start),
                }
                for m in self.moments
            ],
            "owners": [asdict(owner) | {"category": owner.category.value} for owner in self.owners],
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Footprint:
        return cls(
            moments=[
                Moment(Phase(m["phase"]), m["block"], m["module"], _categories(m["bytes"]), _categories(m["start"]))
                for m in said["moments"]
            ],
            held=_categories(said["held"]),
            owners=[Owner(o["module"], o["block"], Category(o["category"]), o["bytes"]) for o in said["owners"]],
        )


def add(*parts: Bytes) -> dict[Category, int]:
    """The sum by category, in the order of Category."""
    total: Counter[Category] = Counter()
    for part in parts:
        total.update(part)
    return {category: total[category] for category in Category if total[category]}


def plain(found: Bytes) -> dict[str, int]:
    """With every category, by its words."""
    return {category.value: found.get(category, 0) for category in Category}


def _words(found: Bytes) -> dict[str, int]:
    return {category.value: size for category, size in found.items() if size}


def _categories(said: Mapping[str, int]) -> dict[Category, int]:
    return {Category(word): size for word, size in said.items() if size}


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole model, before an engine divides it. Shared ones appear once."""

    name: str
    block: str
    shape: tuple[int, ...]
    bytes: int  # as it is stored
    trains: bool

    @property
    def numbers(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


def total(weights: Iterable[Weight], trains: bool | None = None) -> int:
    """Bytes of all, or of those that train or do not."""
    return sum(w.bytes for w in weights if trains in (None, w.trains))
