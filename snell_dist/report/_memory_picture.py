"""A memory report as one picture: what its page shows first."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

from snell_dist.config import UserError
from snell_dist.footprint import Category, Footprint, Phase
from snell_dist.memory.gpus import GIB, in_words
from snell_dist.report._memory_rows import CARDS_GIB, COLOURS, LINES, Page, Row, where

INK, SOFT, LINE = "#1d232b", "#66717e", "#e3e7ec"
MARKERS = "osD^P*Xv"


def draw(page: Page) -> bytes:
    """A PNG: the peaks by category, two time lines, the growth, memory against what trains."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("report: matplotlib is not installed: pip install 'snell_dist[report]'") from None
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
    }
    style |= {"axes.edgecolor": LINE, "xtick.color": SOFT, "ytick.color": SOFT, "axes.labelcolor": SOFT}
    with matplotlib.rc_context(style):
        shown = list(_named(page, page.shown))
        figure = Figure(figsize=(12, 4.4 + 0.32 * len(shown) + 3.4), layout="constrained")
        parts: Any = figure.subfigures(3, 1, height_ratios=[1.2 + 0.32 * len(shown), 3.2, 3.4])
        bars, steps, curves = parts
        _bars(bars.subplots(), page, shown)
        pair = [(str(row.labels[page.series]), source, row.found[source]) for row, source in page.pair]
        tallest = max(footprint.peak_bytes for *_, footprint in pair)
        for ax, (name, source, footprint) in zip(steps.subplots(1, len(pair), squeeze=False).flat, pair, strict=True):
            _step(ax, f"{name}, {source}", footprint, tallest)
        growth, against = curves.subplots(1, 2)
        _growth(growth, page)
        _against(against, page)
        names, marks = growth.get_legend_handles_labels()[::-1]
        curves.legend(marks, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
        figure.supxlabel("   ".join(page.ran.values()), fontsize=6, color=SOFT, x=0.01, ha="left")
        stream = io.BytesIO()
        figure.savefig(stream, dpi=130)
    return stream.getvalue()


def _named(page: Page, rows: Sequence[Row]) -> Iterator[tuple[str, Footprint]]:
    for row in rows:
        for source, footprint in row.found.items():
            yield f"{row.labels[page.series]}{f', {source}' if len(row.found) > 1 else ''}", footprint


def _bars(ax: Any, page: Page, shown: Sequence[tuple[str, Footprint]]) -> None:
    names = [name for name, _ in shown]
    left = [0.0] * len(shown)
    for category in Category:
        widths = [footprint.peak.bytes.get(category, 0) / GIB for _, footprint in shown]
        if any(widths):
            ax.barh(names, widths, left=left, color=COLOURS[category], label=category.value, edgecolor="white", lw=0.5)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for name, end, (_, footprint) in zip(names, left, shown, strict=True):
        ax.annotate(in_words(footprint.peak_bytes), (end, name), (4, 0), textcoords="offset points", va="center")
    for card in CARDS_GIB:
        if card < 1.15 * max(left):
            ax.axvline(card, color=SOFT, ls="--", lw=0.8)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0, labelcolor=INK)
    ax.set(xlim=(0, 1.15 * max(left)), xlabel="GiB")
    fixed = ", ".join(f"{label} {page.rows[0].labels[label]}" for label in page.filters)
    ax.set_title(f"{page.title}: the peak of one step{f' ({fixed})' if fixed else ''}", fontsize=11, color=INK)
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _step(ax: Any, name: str, footprint: Footprint, tallest: int) -> None:
    moments = footprint.moments
    edges = range(len(moments) + 1)
    present = [c for c in Category if any(m.bytes.get(c) for m in moments)]
    layers = [[m.bytes.get(c, 0) / GIB for m in [*moments, moments[-1]]] for c in present]
    ax.stackplot(edges, layers, colors=[COLOURS[c] for c in present], step="post", lw=0)
    forward = next((i for i, m in enumerate(moments) if m.phase is not Phase.FORWARD), len(moments))
    step = next((i for i, m in enumerate(moments) if m.phase is Phase.STEP), len(moments))
    ax.axvspan(forward, step, color=LINE, alpha=0.6, zorder=-1, lw=0)
    for begin, end, word in ((0, forward, "forward"), (forward, step, "backward"), (step, len(moments), "step")):
        if end > begin:
            ax.text((begin + end) / 2, 1.3 * tallest / GIB, word, color=SOFT, ha="center", va="top", fontsize=8)
    peak, at = footprint.peak, moments.index(footprint.peak) + 0.5
    side = "left" if at < len(moments) / 3 else "right" if at > 0.67 * len(moments) else "center"
    ax.plot([at, at], [0, peak.total / GIB], color=INK, lw=1, ls=":")
    ax.text(at, 1.02 * peak.total / GIB, f"{in_words(peak.total)}: {where(peak)}", ha=side, color=INK)
    ax.set(
        xlim=(0, len(moments)), ylim=(0, 1.3 * tallest / GIB), ylabel="GiB", xticks=[], xlabel="time, block by block"
    )
    ax.set_title(name, color=INK)


def _growth(ax: Any, page: Page) -> None:
    for number, (name, rows) in enumerate(_by_contender(page, page.alike(page.rows[0], but=[page.over])).items()):
        points = sorted((row.labels[page.over], row.peak_bytes / GIB) for row in rows)
        ax.plot(*zip(*points, strict=True), label=name, **_look(number))
    ax.set_xscale("log", base=2)
    ax.set(xlabel=page.over, yscale="log", ylabel="GiB")
    _plain(ax.xaxis, ax.yaxis)
    ax.set_title(f"How it grows with {page.over}", color=INK)
    ax.grid(axis="y", color=LINE)


def _against(ax: Any, page: Page) -> None:
    what = page.against or "trainable parameters"
    for number, (name, rows) in enumerate(_by_contender(page, page.shown).items()):
        across = [row.figures[page.against] if page.against else row.trainable for row in rows]
        ax.scatter(across, [row.peak_bytes / GIB for row in rows], label=name, s=60, **_look(number, lines=False))
    ax.set(xscale="log", yscale="log", xlabel=what, ylabel="GiB")
    _plain(ax.yaxis)
    ax.set_title(f"Memory against {what}", color=INK)
    ax.grid(color=LINE)


def _plain(*axes: Any) -> None:
    """Logarithmic axes with numbers that one reads."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis in axes:
        if axis.axis_name == "y":
            low, high = axis.get_view_interval()
            axis.axes.set_ylim(2 ** math.floor(math.log2(low)), 2 ** math.ceil(math.log2(high)))
        axis.set_major_locator(LogLocator(base=2))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def _by_contender(page: Page, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """In the order of all rows, so that a contender looks the same everywhere."""
    found: dict[str, list[Row]] = {str(row.labels[page.series]): [] for row in page.rows}
    for row in rows:
        found[str(row.labels[page.series])].append(row)
    return {name: mine for name, mine in found.items() if mine}


def _look(number: int, lines: bool = True) -> dict[str, Any]:
    look = {"color": LINES[number % len(LINES)], "marker": MARKERS[number % len(MARKERS)]}
    return look | ({"lw": 1.8, "ms": 5} if lines else {})
