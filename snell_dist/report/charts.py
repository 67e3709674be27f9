"""The report's pictures: small SVG and PNG, in the page's own colours, with what they show as text."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 340, 180
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 26, 24
Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], title: str, top: float | None = None) -> str:
    """A line for each series over steps; empty where there is nothing to draw. `top`: of the vertical axis."""
    series = {name: [p for p in points if math.isfinite(p[1])] for name, points in series.items()}
    series = {name: points for name, points in series.items() if points}
    if not series:
        return ""
    values = [y for points in series.values() for _, y in points]
    last = max(x for points in series.values() for x, _ in points)
    low, high = (0.0, top) if top else _span(min(values), max(values))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / last
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low) / (high - low)

    parts = [_axis(low, high, last)]
    for number, (name, points) in enumerate(series.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in points))
        x, y = place(*points[-1])
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        parts.append(f'<circle class="s{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>')
        if len(series) > 1:
            parts.append(f'<text class="key s{number}" x="{LEFT + 90 * number}" y="{TOP - 1}">{escape(name)}</text>')
    ends = "; ".join(f"{name} {_short(points[0][1])} to {_short(points[-1][1])}" for name, points in series.items())
    return _svg(title, f"{title}: {ends} over {int(last)} steps", parts)


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> str:
    """Accuracy within bins of confidence; on the diagonal a model knows what it knows."""
    number = np.minimum((confidence * bins).astype(int), bins - 1)
    width = (WIDTH - LEFT - RIGHT) / bins
    tall = HEIGHT - TOP - BOTTOM
    parts = [_axis(0.0, 1.0, 1.0)]
    for b in range(bins):
        mine = number == b
        if not mine.any():
            continue
        share = right[mine].mean()
        said = f"confidence {b / bins:.2f} to {(b + 1) / bins:.2f}: {share:.1%} right of {mine.sum():,}"
        x, y = LEFT + b * width + 1, HEIGHT - BOTTOM - tall * share
        box = f'x="{x:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{tall * share:.1f}"'
        weight = 0.35 + 0.65 * mine.mean() ** 0.5
        parts.append(f'<rect class="bar" {box} opacity="{weight:.2f}"><title>{said}</title></rect>')
    parts.append(f'<line class="diagonal" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{TOP}"/>')
    return _svg("accuracy by confidence", "Reliability diagram: accuracy within bins of confidence", parts)


def confusion(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """[classes, classes] counts, rows by true class."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (label, predicted), 1)
    return counts


def heat(counts: np.ndarray) -> str:
    """A PNG as base64, one pixel a field: each row's shares; right ones in blue, wrong ones in red."""
    from PIL import Image

    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    strength = np.sqrt(share)[..., None]  # few mistakes in many classes stay visible
    right = np.eye(len(counts), dtype=bool)[..., None]
    colour = np.where(right, (31, 95, 139), (196, 52, 60))
    pixels = (255 * (1 - strength) + colour * strength).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def _axis(low: float, high: float, last: float) -> str:
    marks = []
    for i in range(5):
        value, y = low + (high - low) * i / 4, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * i / 4
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text class="tick" x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{_short(value)}</text>')
    for x, value, anchor in ((LEFT, 0.0, "start"), (WIDTH - RIGHT, last, "end")):
        marks.append(f'<text class="tick" x="{x}" y="{HEIGHT - 8}" text-anchor="{anchor}">{_short(value)}</text>')
    return "".join(marks)


def _span(low: float, high: float) -> tuple[float, float]:
    """From 0 where that wastes little, with room above."""
    low = 0.0 if 0 <= low < 0.6 * high else low
    return low, high + 0.05 * (high - low) if high > low else low + 1.0


def _short(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-2):
        return f"{value:.0e}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}".rstrip("0")


def _svg(title: str, said: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}"'
    return f'<svg {size}><text class="title" x="0" y="11">{escape(title)}</text>{"".join(parts)}</svg>'
