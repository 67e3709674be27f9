"""Deep models by a few of their blocks: equal blocks that follow each other differ in nothing but their place.

Of each row of equal blocks the first, the second and the last compute; those between hand their input on, and the
second stands for them. Parameters, gradients at the step and optimizer state are all there; what grows from block to
block in forward and backward grows as much with each that stands out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from snell_dist.adapted import AdaptedLinear
from snell_dist.anatomy import Backbone
from snell_dist.footprint import Bytes, Category, Footprint, Moment, Owner, Phase
from snell_dist.memory.timeline import Birth, Reading, block_of

LEAST = 4  # blocks of a row, to leave one out
GROWS = Category.ACTIVATIONS, Category.GRADIENTS
RATE = re.compile(r"drop_prob=[\d.e-]+")  # grows along the depth, and changes no byte


@dataclass(frozen=True)
class Row:
    """Addresses of equal blocks. `second` stands for itself and for `out`, which follow it.

    modules: the blocks' own names, by address.
    """

    first: str
    second: str
    out: tuple[str, ...]
    last: str
    modules: Mapping[str, str]

    @property
    def forward(self) -> list[str]:
        return [self.second, *self.out]

    def moved(self, module: str, old: str, new: str) -> str:
        """The module of the same place in another block."""
        return module.replace(self.modules[old], self.modules[new], 1)

    def renamed(self, owner: Owner, block: str) -> Owner:
        return replace(owner, block=block, module=self.moved(owner.module, owner.block, block))


def shorten(backbone: Backbone) -> tuple[list[Row], list[nn.Parameter]]:
    """Has blocks stand out, in place. Returns the rows, and the parameters that will get no gradient."""
    rows, left_out = [], list[nn.Parameter]()
    for row in equal_rows(backbone):
        if len(row) >= LEAST:
            rows.append(Row(row[0], row[1], tuple(row[2:-1]), row[-1], backbone.blocks))
            for address in rows[-1].out:
                block = backbone.model.get_submodule(backbone.blocks[address])
                block.forward = _hand_on
                left_out += [p for p in block.parameters() if p.requires_grad]
    return rows, left_out


def equal_rows(backbone: Backbone) -> Iterator[list[str]]:
    """Addresses of blocks in a row that are equal and have one parent."""

    def alike(address: str) -> Any:
        name = backbone.blocks[address]
        return name.rpartition(".")[0], signature(backbone.model.get_submodule(name))

    for _, row in groupby(backbone.blocks, key=alike):
        yield list(row)


def signature(block: nn.Module) -> tuple[Any, ...]:
    """All of a block that its memory may depend on."""
    found: list[Any] = ["forward" in vars(block)]  # recomputed
    for name, module in block.named_modules():
        method = module.method if isinstance(module, AdaptedLinear) else None
        found.append((name, type(module), RATE.sub("", module.extra_repr()), repr(method)))
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found += [(n, t.shape, t.dtype, t.requires_grad) for n, t in tensors]
    return tuple(found)


def lengthen(reading: Reading, rows: Sequence[Row]) -> Footprint:
    """The footprint of the whole depth, from a reading of the shortened model."""
    moments, origins = list[Moment](), list[tuple[int, str]]()  # where a moment is from: its number, its block
    grown: Bytes = {}
    standing = {row.second: row for row in rows}
    groups = [list(g) for _, g in groupby(enumerate(reading.moments), key=lambda m: (m[1].block, _way(m[1].phase)))]
    for group, following in zip(groups, [*groups[1:], None], strict=True):
        row = standing.get(group[0][1].block)
        if _way(group[0][1].phase) == Phase.STEP:
            grown = {}  # gradients of all blocks are there now
        names, growth = [group[0][1].block], dict[Category, int]()
        if row is not None and following is not None:
            names = row.forward if _way(group[0][1].phase) == Phase.FORWARD else row.forward[::-1]
            growth = _minus(following[0][1].start, group[0][1].start)
        for name in names:
            for number, moment in group:
                module = moment.module if row is None else row.moved(moment.module, moment.block, name)
                start, size = _plus(moment.start, grown), _plus(moment.bytes, grown)
                moments.append(Moment(moment.phase, name, module, size, start))
                origins.append((number, name))
            if name != names[-1]:
                grown = _plus(grown, growth)
    peak = max(range(len(moments)), key=lambda i: moments[i].total)
    number, block = origins[peak]
    return Footprint(moments, reading.held(), _owners(reading, rows, number, block, moments[peak].phase == Phase.STEP))


def births(reading: Reading, rows: Sequence[Row], phase: Phase, module: str) -> list[Birth]:
    """What a module makes in a phase, in the whole depth."""
    block = block_of(module, reading.blocks)
    row = next((row for row in rows if block in row.forward), None)
    seen, there = (block, module) if row is None else (row.second, row.moved(module, block, row.second))
    found = reading.births(phase, there)
    if not found:
        return []
    moments = lengthen(reading, rows).moments
    after, before = (
        next(sum(m.start.values()) for m in some if m.block == name and _way(m.phase) == _way(phase))
        for some, name in ((moments, block), (reading.moments, seen))
    )
    return [replace(birth, live=birth.live + after - before) for birth in found]


def total(by_block: Mapping[str, int], rows: Sequence[Row]) -> int:
    """Over all blocks, of what each block does alike."""
    return sum(by_block.values()) + sum(by_block.get(row.second, 0) * len(row.out) for row in rows)


def _owners(reading: Reading, rows: Sequence[Row], number: int, block: str, step: bool) -> list[Owner]:
    """At the peak, in `block`. A block that stands out holds as much as the one that is as far as it is."""
    there = reading.owners(number)
    found = list(there)
    for row in rows:
        grown = [o for o in there if o.category in ((Category.ACTIVATIONS,) if step else GROWS)]
        if block in row.forward:
            place = row.forward.index(block)
            like = [*[row.first] * place, None, *[row.last] * (len(row.forward) - place - 1)]
            passing = [o for o in found if o.block == row.second and not o.category.stays]
            found = [o for o in found if o not in passing] + [row.renamed(o, block) for o in passing]
        else:
            like = [None, *[row.second] * len(row.out)]
        for name, source in zip(row.forward, like, strict=True):
            found += [row.renamed(o, name) for o in grown if o.block == source]
    return sorted(found, key=lambda owner: -owner.bytes)


def _hand_on(x: Any, *rest: Any, **options: Any) -> Any:
    return x


def _way(phase: Phase) -> Phase:
    """A recomputation belongs to its backward."""
    return Phase.BACKWARD if phase == Phase.RECOMPUTE else phase


def _plus(one: Bytes, two: Bytes) -> dict[Category, int]:
    total = Counter(one)
    total.update(two)
    return dict(total)


def _minus(one: Bytes, two: Bytes) -> dict[Category, int]:
    total = Counter(one)
    total.subtract(two)
    return {category: size for category, size in total.items() if size}
