"""From the lives of storages to a footprint: what each was for, and what lived when."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from snell_dist.footprint import OUTSIDE, Bytes, Category, Footprint, Moment, Owner, Phase, add


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
    """Storages name their segment and visit by number. `end`: a clock after all that happened.

    flops: operations by module.
    """

    storages: Sequence[Storage]
    visits: Sequence[Visit]
    segments: Sequence[Segment]
    end: int
    flops: Mapping[str, int]


@dataclass(frozen=True)
class Birth:
    """A storage's, while a module is at work. `live`: bytes just before."""

    category: Category
    size: int
    live: int


@dataclass
class _Group:
    """Visits in a row in one block."""

    end: int
    phase: Phase
    block: str


@dataclass(frozen=True)
class Reading:
    """A history told apart. `times`: when each moment was highest."""

    history: History
    blocks: Mapping[str, str]  # addresses by the modules' names
    categories: Mapping[int, Category]  # by a storage's id
    moments: list[Moment]
    times: list[int]

    def footprint(self) -> Footprint:
        peak = max(range(len(self.moments)), key=lambda i: self.moments[i].total)
        return Footprint(self.moments, self.held(), self.owners(peak))

    def held(self) -> Bytes:
        """What stays after the step."""
        found: Counter[Category] = Counter()
        for storage in self.history.storages:
            if storage.died is None and self.categories[id(storage)].stays:
                found[self.categories[id(storage)]] += storage.size
        return add(found)

    @property
    def flops(self) -> dict[str, int]:
        """By block."""
        found: Counter[str] = Counter()
        for module, count in self.history.flops.items():
            found[block_of(module, self.blocks)] += count
        return dict(found)

    def owners(self, moment: int) -> list[Owner]:
        """Who holds how much when that moment is highest."""
        time, found = self.times[moment], Counter[tuple[str, Category]]()
        for storage in self.history.storages:
            if storage.born <= time and (storage.died is None or storage.died > time):
                found[storage.module, self.categories[id(storage)]] += storage.size
        owners = [Owner(module, block_of(module, self.blocks), kind, size) for (module, kind), size in found.items()]
        return sorted(owners, key=lambda owner: -owner.bytes)

    def births(self, phase: Phase, module: str) -> list[Birth]:
        """Of all that is made while this module is at work in this phase, in the order of time."""
        found, visits = list[Birth](), self.history.visits
        for storage in self.history.storages:
            visit = visits[storage.visit]
            if storage.born and (visit.phase, visit.module) == (phase, module):
                found.append(Birth(self.categories[id(storage)], storage.size, self._live_before(storage.born)))
        return found

    def _live_before(self, time: int) -> int:
        storages = self.history.storages
        return sum(s.size for s in storages if s.born < time and (s.died is None or s.died > time))


def read(history: History, blocks: Mapping[str, str], adapted: Collection[str]) -> Reading:
    """adapted: names of adapted layers."""
    categories = {id(storage): _category(storage, history, adapted) for storage in history.storages}
    events = sorted(_events(history.storages), key=lambda event: event[0])
    live: Counter[Category] = Counter()
    moments, times, position, total = list[Moment](), list[int](), 0, 0
    for group in _groups(history, blocks):
        start = snapshot = dict(live)
        highest, at = total, events[position - 1][0] if position else 0
        while position < len(events) and events[position][0] < group.end:
            time, change, storage = events[position]
            live[categories[id(storage)]] += change
            total += change
            position += 1
            if total > highest:
                highest, at, snapshot = total, time, dict(live)
        module = _module_at(history.visits, at)
        moments.append(Moment(group.phase, group.block, module, add(snapshot), add(start)))
        times.append(at)
    return Reading(history, blocks, categories, moments, times)


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
