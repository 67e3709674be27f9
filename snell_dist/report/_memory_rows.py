"""What a memory report shows: rows of footprints, and the colours and sizes that its page and its picture share."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from snell_dist.footprint import Category, Footprint, Moment
from snell_dist.memory.gpus import GIB

CARDS_GIB = (16, 24, 40, 80, 141)  # memories of GPUs that people have
OWNERS = 8  # named under a time line
COLOURS = {  # on light and on dark paper, and apart for the colour-blind too
    Category.FROZEN: "#717288",
    Category.TRAINABLE: "#0c50c7",
    Category.BUFFERS: "#e4c4ec",
    Category.GRADIENTS: "#47aefe",
    Category.OPTIMIZER: "#2ea167",
    Category.INPUTS: "#9f4500",
    Category.ACTIVATIONS: "#eca705",
    Category.ADAPTER: "#fb4c0d",
    Category.TEMPORARY: "#c884ba",
    Category.GATHERED: "#7e2d85",
    Category.COMMUNICATION: "#a7e38f",
}
LINES = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999")  # contenders: Tol's bright scheme


@dataclass(frozen=True)
class Row:
    """One configuration: its labels (the same keys in every row of a page) and its bytes, on one device.

    `predicted` or `measured` or both; `beyond`: bytes that only a GPU shows, an estimate apart from the footprint;
    `figures`: more columns, by their heading, which names the unit.
    """

    labels: Mapping[str, str | int]
    trainable: int
    predicted: Footprint | None = None
    measured: Footprint | None = None
    beyond: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.found:
            raise ValueError(f"{dict(self.labels)} has neither a prediction nor a measurement")

    @property
    def found(self) -> dict[str, Footprint]:
        both = {"predicted": self.predicted, "measured": self.measured}
        return {source: footprint for source, footprint in both.items() if footprint is not None}

    @property
    def peak_bytes(self) -> int:
        """As measured, where it was."""
        return (self.measured or self.predicted).peak_bytes  # type: ignore[union-attr]  # one is there

    @property
    def error(self) -> float | None:
        """Of the predicted peak, relative to the measured one; signed. None without both."""
        if self.predicted is None or self.measured is None:
            return None
        return self.predicted.peak_bytes / self.measured.peak_bytes - 1


@dataclass(frozen=True)
class Page:
    """What a page says. `ran`: what ran, where and when: date, machine, versions, command.

    `series`: the label that tells the contenders apart; `over`: the label with numbers along which memory grows;
    `against`: the figure (a heading of Row.figures, less is better) that memory is weighed against, or None for the
    trainable parameters (more is better). The first row's labels are what the page shows first, and `beside` the
    contender that its time line is beside, None: the next one.
    """

    title: str
    ran: Mapping[str, str]
    sentences: Sequence[str]
    rows: Sequence[Row]
    series: str
    over: str
    config: str
    notes: Sequence[str] = ()
    against: str | None = None
    beside: str | None = None

    def __post_init__(self) -> None:
        keys = {tuple(row.labels) for row in self.rows}
        if len(keys) != 1 or not {self.series, self.over} <= set(*keys):
            raise ValueError(f"every row needs the same labels, {self.series} and {self.over} among them: {keys}")

    @property
    def filters(self) -> dict[str, list[str | int]]:
        """The values of the labels, but for the contenders' own, that are not the same in all rows; numbers sorted."""
        found = {label: list(dict.fromkeys(row.labels[label] for row in self.rows)) for label in self.rows[0].labels}
        return {
            label: sorted(values, key=lambda value: value if isinstance(value, int) else 0)
            for label, values in found.items()
            if len(values) > 1 and label != self.series
        }

    @property
    def shown(self) -> list[Row]:
        """The contenders under the first row's other labels."""
        return self.alike(self.rows[0])

    @property
    def pair(self) -> list[tuple[Row, str]]:
        """The two of `shown` (one, if there is one) whose time lines are side by side first, each with its source."""
        found = [(row, source) for row in self.shown for source in row.found]
        named = (other for other in found[1:] if self.beside in (None, other[0].labels[self.series]))
        return [found[0], *itertools.islice(named, 1)]

    def alike(self, row: Row, but: Sequence[str] = ()) -> list[Row]:
        """Rows with the same filters, but for these."""
        fixed = [label for label in self.filters if label not in but]
        return [other for other in self.rows if all(other.labels[f] == row.labels[f] for f in fixed)]


def fits_on(count: int) -> int | None:
    """The smallest of CARDS_GIB that holds so many bytes; None where none does."""
    return next((card for card in CARDS_GIB if count <= card * GIB), None)


def where(moment: Moment) -> str:
    return ", ".join(filter(None, (moment.phase.value, moment.block)))


# The page.
