"""From the lives of storages to a footprint: what each was for, and what lived when."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from snell_dist.footprint import OUTSIDE, Category, Footprint, Moment, Owner, Phase, add


class Storage:
    """One storage's life, in counts of a ledger's clock. `died` is None while it lives."""

    __slots__ = ("born", "category", "died", "module", "reference", "segment", "size", "visit")

    def __init__(self, size: int, born: int, segment: int, visit: int, module: str) -> None:
        self.size, self.born, self.segment, self.visit, self.module = size, born, segment, visit, module
        self.died: int | None = None
        self.category: Category | None = None  # where somebody said it
        self.reference: Any = None


@dataclass
class Segment:
    """A stretch of one phase."""

    phase: Phase
    end: int | None = None


@dataclass(frozen=True)
class Visit:
    """From here on this module is at work."""

    start: int
    phase: Phase
    module: str


@dataclass(frozen=True)
class History:
    """Storages name their segment and visit by number. `end`: a clock after all that happened."""

    storages: Sequence[Storage]
    visits: Sequence[Visit]
    segments: Sequence[Segment]
    end: int


@dataclass
class _Group:
    """Visits in a row in one block."""

    end: int
    phase: Phase
    block: str


def read(history: History, blocks: Mapping[str, str], adapted: Collection[str]) -> Footprint:
    """blocks: addresses by the modules' names; adapted: names of adapted layers."""
    category = {id(storage): _category(storage, history, adapted) for storage in history.storages}
    events = sorted(_events(history.storages), key=lambda event: event[0])
    live: Counter[Category] = Counter()
    moments, top, position, total = list[Moment](), (-1, 0), 0, 0
    for group in _groups(history, blocks):
        highest, at, snapshot = total, events[position - 1][0] if position else 0, dict(live)
        while position < len(events) and events[position][0] < group.end:
            time, change, storage = events[position]
            live[category[id(storage)]] += change
            total += change
            position += 1
            if total > highest:
                highest, at, snapshot = total, time, dict(live)
        moments.append(Moment(group.phase, group.block, _module_at(history.visits, at), add(snapshot)))
        if highest > top[0]:
            top = highest, at
    stay: Counter[Category] = Counter()
    owners: Counter[tuple[str, Category]] = Counter()
    for storage in history.storages:
        kind = category[id(storage)]
        if storage.died is None and kind.stays:
            stay[kind] += storage.size
        if storage.born <= top[1] and (storage.died is None or storage.died > top[1]):
            owners[storage.module, kind] += storage.size
    named = [Owner(module, block_of(module, blocks), kind, size) for (module, kind), size in owners.items()]
    return Footprint(moments, add(stay), sorted(named, key=lambda owner: -owner.bytes))


def block_of(module: str, blocks: Mapping[str, str]) -> str:
    """The address of the block that a module is in, or its topmost module's name."""
    name = module
    while name:
        if name in blocks:
            return blocks[name]
        name = name.rpartition(".")[0]
    return module.partition(".")[0] or OUTSIDE


def _category(storage: Storage, history: History, adapted: Collection[str]) -> Category:
    if storage.category is not None:
        return storage.category
    segment = history.segments[storage.segment]
    if not storage.born or (storage.died is None and segment.phase == Phase.FORWARD):
        return Category.BUFFERS  # what a layer remembers
    if storage.died is None:
        return Category.TEMPORARY
    forward = segment.phase in (Phase.FORWARD, Phase.RECOMPUTE)
    if forward and segment.end is not None and storage.died > segment.end:
        return Category.ACTIVATIONS
    following = storage.visit + 1
    ended = history.visits[following].start if following < len(history.visits) else history.end
    within = storage.module in adapted and storage.died <= ended
    return Category.ADAPTER if within else Category.TEMPORARY


def _events(storages: Sequence[Storage]) -> list[tuple[int, int, Storage]]:
    """Births and deaths: (time, change in bytes, which)."""
    births = [(storage.born, storage.size, storage) for storage in storages]
    return births + [(storage.died, -storage.size, storage) for storage in storages if storage.died is not None]


def _groups(history: History, blocks: Mapping[str, str]) -> list[_Group]:
    """Of visits in which nothing is made, such as those between two blocks, the frees count to the one before."""
    groups: list[_Group] = []
    births = sorted(storage.born for storage in history.storages)
    for visit, following in pairwise([*history.visits, Visit(history.end, Phase.STEP, "")]):
        block = block_of(visit.module, blocks)
        idle = bisect_left(births, visit.start) == bisect_left(births, following.start)
        if groups and (idle or (groups[-1].phase, groups[-1].block) == (visit.phase, block)):
            groups[-1].end = following.start
        else:
            groups.append(_Group(following.start, visit.phase, block))
    return groups


def _module_at(visits: Sequence[Visit], time: int) -> str:
    return visits[bisect_left(visits, time + 1, key=lambda visit: visit.start) - 1].module
