"""Plans in words, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from snell_dist.footprint import OUTSIDE, Bytes, Moment
from snell_dist.log import columns
from snell_dist.memory.gpus import in_words
from snell_dist.memory.plan import Option, Plan, delta
from snell_dist.memory.profile import Profiled, compared


def plan(made: Plan, assumed_classes: bool, past: str | None = None) -> str:
    """past: how far earlier predictions were off."""
    own, machine = made.own, made.machine
    room = machine.gpu.memory - own.bytes
    verdict = f"fits, with {in_words(room)} to spare" if room >= 0 else f"does not fit: {in_words(-room)} too much"
    batch = made.config.data.batch_size
    pieces = f"{machine.gpus} x {own.micro_batches} x {own.micro_batch_size}"
    lines = [
        f"{made.name} on {machine}: a batch of {batch} is {pieces} images",
        "",
        f"As it is ({own.words}) it {verdict}.",
        f"  {in_words(own.footprint.peak_bytes)} predicted + {in_words(sum(own.estimated.values()))} estimated"
        f" ({_sizes(own.estimated)})",
        f"  the peak is in {where(own.footprint.peak)}: {categories(own.footprint.peak.bytes)}",
        f"  at most {own.largest} image{'s' * (own.largest != 1)} at a time would fit",
    ]
    if assumed_classes:
        lines.append(f"  ({made.classes:,} classes are assumed, as only the data itself knows its own)")
    if past:
        lines.append(f"  {past}")
    lines += ["", *_table(made), "", f"Choice: {made.choice.words}; {made.reason}."]
    change = delta(made)
    lines.append(
        yaml.safe_dump(change, sort_keys=False, default_flow_style=None).rstrip() if change else "Nothing to change."
    )
    return "\n".join(lines)


def categories(found: Bytes) -> str:
    """The parts above a hundredth, the largest first."""
    total = sum(found.values())
    large = sorted(((size, category) for category, size in found.items() if size > total / 100), reverse=True)
    return ", ".join(f"{category.value} {in_words(size)}" for size, category in large)


def where(moment: Moment) -> str:
    return f"{moment.phase.value}, {moment.module or moment.block}" if moment.block != OUTSIDE else moment.phase.value


def _table(made: Plan) -> list[str]:
    cheapest = min(option.step_s for option in made.options)
    head = (
        "",
        "engine",
        "remat",
        "images",
        "a GPU",
        "its host",
        "sent a step",
        "between nodes",
        "step",
        "images at most",
    )
    rows = [head, *(_row(made, option, cheapest) for option in made.options)]
    legend = "* the choice, x does not fit; step: estimated time over the least; at most: images at a time"
    return [*columns(rows, right=range(3, len(head))), legend]


def _row(made: Plan, option: Option, cheapest: float) -> tuple[str, ...]:
    mark = "*" if option is made.choice else " " if made.fits(option) else "x"
    share, passes = option.share, f"{option.micro_batches} x " if option.micro_batches > 1 else ""
    return (
        mark,
        str(option.engine),
        option.remat.policy,
        f"{passes}{option.micro_batch_size}",
        in_words(option.bytes),
        in_words(share.host_bytes) if share.host_bytes else "",
        in_words(share.wire_bytes),
        in_words(share.between_nodes_bytes) if made.machine.nodes > 1 else "",
        f"{option.step_s / cheapest:.2f}",
        str(option.largest),
    )


def _sizes(found: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {in_words(size)}" for name, size in found.items() if size)


def profiled(found: Profiled, name: str, rank: int) -> str:
    """Predicted, measured, signed error: of the peak, by category, by block."""
    one, two = found.predicted.footprint, found.measured
    rows = [("", "predicted", "measured", "error"), _compared("peak", one.peak_bytes, two.peak_bytes)]
    if found.allocated is not None:
        rows.append(_compared("peak, as the allocator counts", one.peak_bytes, found.allocated))
    tables = compared(found)
    rows += [_compared(f"  {what}", *sizes) for what, *sizes in tables["categories"]]
    rows += [("by block, at the peak", "", "", "")]
    rows += [_compared(f"  {block or 'outside'}", *sizes) for block, *sizes in tables["blocks"]]
    times = f"a step takes {found.step_s:.3f} s, recorded {found.recorded_s:.3f} s"
    return "\n".join(
        [
            f"{name}, rank {rank}: predicted in {where(one.peak)}; measured in {where(two.peak)}",
            "",
            *columns(rows, right=(1, 2, 3)),
            "",
            f"{times} ({found.recorded_s / found.step_s:.1f} times)",
            *(f"{what}: {in_words(size)}" for what, size in found.device.items()),
        ]
    )


def _compared(what: str, predicted: int, measured: int) -> tuple[str, str, str, str]:
    error = f"{predicted / measured - 1:+.2%}" if measured else ""
    return what, in_words(predicted), in_words(measured), error
