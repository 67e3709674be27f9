"""The arithmetic that engines share when they say what a rank holds and sends.

A rank's time line is that of one process with all of the model: activations and temporaries stay as they are, and what
the engine divides, gathers or sends is put in place of what that process had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from snell_dist.engines import Job, Share
from snell_dist.footprint import OUTSIDE, Bytes, Category, Footprint, Moment, Owner, Phase, Weight, add

BACKWARD = (Phase.BACKWARD, Phase.RECOMPUTE)
REDUCES = "(the engine)"  # which is at work after the last backward


@dataclass(frozen=True)
class Visit:
    """A moment with what an engine has to know of its place in the step. Units are blocks, and OUTSIDE for the rest."""

    moment: Moment
    unit: str
    entered: tuple[str, ...]  # units of this pass (forward or backward) up to here, this one included, in order
    first: bool  # no backward came before this pass: the gradients are of this micro-batch alone
    last: bool  # no forward comes after it: the gradients of this pass are reduced
    before: Moment | None  # the visit before, in the same pass

    @property
    def gradients(self) -> int:
        """Bytes of the whole model's, at this visit."""
        return self.moment.bytes.get(Category.GRADIENTS, 0)

    @property
    def gradients_before(self) -> int:
        return self.before.bytes.get(Category.GRADIENTS, 0) if self.before else 0

    @property
    def enters(self) -> bool:
        """Whether the visit before was to another block."""
        return self.before is None or self.before.block != self.moment.block


def visits(whole: Footprint, job: Job) -> Iterator[Visit]:
    blocks, kind, passes = set(job.blocks), "", 0
    entered: tuple[str, ...] = ()
    before: Moment | None = None
    final = max((i for i, m in enumerate(whole.moments) if m.phase == Phase.FORWARD), default=-1)
    for i, moment in enumerate(whole.moments):
        now = "backward" if moment.phase in BACKWARD else moment.phase.value
        if now != kind:
            kind, entered, before = now, (), None
            passes += now == "backward"
        unit = moment.block if moment.block in blocks else OUTSIDE
        if unit not in entered:
            entered = (*entered, unit)
        yield Visit(moment, unit, entered, passes <= 1, i > final, before)
        before = moment


def along(whole: Footprint, job: Job, change: Callable[[Visit], Bytes], held: Bytes) -> Footprint:
    """The footprint whose moments have the bytes that `change` puts in place of the whole's, by category."""
    moments = [replace(visit.moment, bytes=_changed(visit.moment.bytes, change(visit))) for visit in visits(whole, job)]
    return _with_owners(Footprint(moments, _changed(whole.held, held), whole.owners))


def higher(visit: Visit, one: Bytes, other: Bytes) -> Bytes:
    """Of two changes of a moment the one that makes it higher."""
    return max(one, other, key=lambda change: sum(_changed(visit.moment.bytes, change).values()))


def _with_owners(footprint: Footprint) -> Footprint:
    """Owners are the whole's at its own peak: each category's are scaled to what this footprint's peak has of it."""
    before: dict[Category, int] = {}
    for owner in footprint.owners:
        before = add(before, {owner.category: owner.bytes})
    peak, owners = footprint.peak, []
    for owner in footprint.owners:
        size = owner.bytes * peak.bytes.get(owner.category, 0) // before[owner.category]
        if size:
            owners.append(replace(owner, bytes=size))
    fresh = [Owner(peak.module, peak.block, c, size) for c, size in peak.bytes.items() if c not in before and size]
    return replace(footprint, owners=sorted([*owners, *fresh], key=lambda owner: -owner.bytes))


def _changed(had: Bytes, changed: Bytes) -> dict[Category, int]:
    return {c: size for c in Category if (size := changed.get(c, had.get(c, 0)))}


def ended_backward(whole: Footprint) -> Footprint:
    """With a moment after backward, where some engines reduce: the whole gradient, no activations, no temporaries."""
    at = next((i for i, m in enumerate(whole.moments) if m.phase == Phase.STEP), None)
    if at is None:
        return whole
    step = whole.moments[at]
    gone = (Category.ACTIVATIONS, Category.ADAPTER, Category.TEMPORARY)
    end = Moment(Phase.BACKWARD, OUTSIDE, REDUCES, {c: size for c, size in step.bytes.items() if c not in gone})
    return replace(whole, moments=[*whole.moments[:at], end, *whole.moments[at:]])


def at_the_end(visit: Visit) -> bool:
    return visit.moment.module == REDUCES


def states(whole: Footprint, trains: int, mine: int) -> int:
    """Optimizer state of a rank that steps `mine` of `trains` bytes: whole copies (moments) shrink, counts do not."""
    copies, counts = divmod(whole.held.get(Category.OPTIMIZER, 0), trains) if trains else (0, 0)
    return copies * mine + counts


def by_group(trained: Iterable[Weight]) -> list[list[Weight]]:
    """As the optimizer has them, matrices first; but for tokens and positions, which it has with the vectors."""
    groups: tuple[list[Weight], list[Weight]] = [], []
    for weight in trained:
        groups[len(weight.shape) < 2].append(weight)
    return [group for group in groups if group]


def step_temporaries(visit: Visit, job: Job, whole: Sequence[int], mine: Sequence[int]) -> int:
    """Temporaries of the step of tensors of `mine` bytes, where the whole model's are `whole`; as the optimizer goes.

    On CUDA the optimizer takes all tensors of a step at once, elsewhere one after another: there the last one's
    denominator still lives while two temporaries of the next are made.
    """

    def together(sizes: Sequence[int]) -> int:
        if job.device_type == "cuda":
            return sum(sizes)
        return max((2 * size + before for before, size in zip([0, *sizes], sizes, strict=False)), default=0)

    had = visit.moment.bytes.get(Category.TEMPORARY, 0)
    return had * together(mine) // together(whole) if any(whole) else had


@dataclass
class Wire:
    """What one rank sends in a step when every collective is a ring."""

    job: Job
    sent: int = 0
    between_nodes: int = 0
    messages: int = 0

    def all_reduce(self, size: int, among: int, apart: int = 1, times: int = 1) -> None:
        """Of `size` bytes, among so many ranks, neighbours in the ring being `apart` ranks from one another."""
        self._send(2 * size, among, apart, times)

    def gather(self, size: int, among: int, apart: int = 1, times: int = 1) -> None:
        """Or scatters while it reduces. size: of the whole, of which each rank has an equal part."""
        self._send(size, among, apart, times)

    def share(self, footprint: Footprint, host_bytes: int = 0) -> Share:
        return Share(footprint, self.sent, self.between_nodes, host_bytes, self.messages)

    def _send(self, size: int, among: int, apart: int, times: int) -> None:
        if among == 1 or not size:
            return
        sent, per_node = times * size * (among - 1) // among, self.job.per_node
        self.sent += sent
        self.messages += times
        inside = self.job.ranks <= per_node or (apart == 1 and per_node % among == 0)
        self.between_nodes += 0 if inside else sent


def units(job: Job) -> dict[str, list[Weight]]:
    """The weights of each unit, in the order of forward; those in no block under OUTSIDE."""
    found: dict[str, list[Weight]] = {name: [] for name in (*job.blocks, OUTSIDE)}
    for weight in job.weights:
        found[weight.block if weight.block in found else OUTSIDE].append(weight)
    return found
