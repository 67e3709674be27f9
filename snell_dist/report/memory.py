"""Memory reports: one HTML page that needs nothing else, and the same figures as CSV, PNG and Markdown.

The page shows which categories the peak is made of, how it grows, one step along its time line, the layers that hold
the bytes at the peak, memory against what trains, and a table of every figure.
"""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snell_dist.config import UserError
from snell_dist.files import write_atomic
from snell_dist.footprint import Bytes, Category, Footprint, Owner
from snell_dist.memory.gpus import MIB, in_words
from snell_dist.report import _memory_picture, _template
from snell_dist.report._memory_rows import CARDS_GIB, COLOURS, LINES, OWNERS, Page, Row, fits_on, where

if TYPE_CHECKING:
    from markupsafe import Markup


def write(page: Page, out: Path) -> list[Path]:
    """Writes OUT.html, OUT.csv, OUT.png and OUT.md, and returns them. UserError where a library is missing."""

    html, table, picture, text = (out.with_suffix(ending) for ending in (".html", ".csv", ".png", ".md"))
    contents: dict[Path, str | bytes] = {
        html: _html(page),
        table: _csv(page),
        picture: _memory_picture.draw(page),
        text: _markdown(page, picture.name),
    }
    for file, content in contents.items():
        write_atomic(file, content)
    return list(contents)


def _html(page: Page) -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("report: plotly is not installed: pip install 'snell_dist[report]'") from None
    present = [
        c for c in Category if any(m.bytes.get(c) for row in page.rows for f in row.found.values() for m in f.moments)
    ]
    entries = [_entry(row, source, present) for row in page.rows for source in row.found]
    data = {
        "categories": [{"name": c.value, "colour": COLOURS[c]} for c in present],
        "cards": CARDS_GIB,
        "lines": LINES,
        "series": page.series,
        "over": page.over,
        "against": page.against,
        "filters": page.filters,
        "chosen": page.rows[0].labels,
        "pair": [[row.labels[page.series], source] for row, source in page.pair],
        "entries": entries,
    }
    plotly = get_plotlyjs()
    return _template.template("memory.html").render(
        page=page,
        sentences=[_bold(sentence) for sentence in page.sentences],
        sources=sorted({source for row in page.rows for source in row.found}),
        head=_head(page, present),
        lines=[_line(page, row, source, present) for row in page.rows for source in row.found],
        legend=[(c.value, COLOURS[c]) for c in present],
        cards=CARDS_GIB,
        plotly=_packed(plotly),
        drawn_by=", ".join(re.findall(r"^\* (plotly\.js .*|Copyright .*|Licensed .*)", plotly, re.MULTILINE)),
        data=_packed(json.dumps(data)),
    )


def _packed(text: str) -> str:
    """For the page's script: compressed, since plotly.js alone has 4.8 MB."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _bold(sentence: str) -> Markup:
    """With its figures emphasised."""
    from markupsafe import Markup, escape

    number = r"\d(?:[\d,.]*\d)?"
    figure = rf"(?:{number} to )?{number}\s?(?:GiB|MiB|%|×)"
    bold = re.sub(figure, lambda found: f"<b>{found.group().replace(' ', chr(160))}</b>", str(escape(sentence)))
    return Markup(bold)


def _entry(row: Row, source: str, present: Sequence[Category]) -> dict[str, Any]:
    """What the page's script draws of one footprint: bytes as lists by category, the time line in MiB."""
    footprint = row.found[source]
    peak = footprint.peak
    moments = footprint.moments
    order = dict.fromkeys([m.block for m in moments] + [owner.block for owner in footprint.owners])
    blocks = {name: i for i, name in enumerate(order)}
    by_block = footprint.by_block
    return {
        "labels": row.labels,
        "source": source,
        "trainable": row.trainable,
        "figures": row.figures,
        "peak": _numbers(peak.bytes, present),
        "held": sum(footprint.held.values()),
        "at": {"moment": moments.index(peak), "words": where(peak), "module": peak.module},
        "blocks": list(blocks),
        "phases": [m.phase.value for m in moments],
        "visits": [blocks[m.block] for m in moments],
        "line": [[round(m.bytes.get(c, 0) / MIB, 1) for m in moments] for c in present],
        "layers": [[i, _numbers(by_block[name], present)] for name, i in blocks.items() if name in by_block],
        "owners": [[module, present.index(category), size] for (module, category), size in _owners(footprint)],
    }


def _owners(footprint: Footprint) -> list[tuple[tuple[str, Category], int]]:
    """The largest at the peak, the same module of all blocks together: blocks.*.mlp.fc1 (12)."""
    found: dict[tuple[str, Category], list[Owner]] = {}
    for owner in footprint.owners:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", owner.module)
        found.setdefault((pattern, owner.category), []).append(owner)
    named = {
        (f"{pattern} ({len(owners)})" if len(owners) > 1 else owners[0].module, category): sum(o.bytes for o in owners)
        for (pattern, category), owners in found.items()
    }
    return sorted(named.items(), key=lambda item: -item[1])[:OWNERS]


def _numbers(found: Bytes, present: Sequence[Category]) -> list[int]:
    return [found.get(category, 0) for category in present]


# A column of the table: its heading, and of each footprint a text and what it is sorted by.
Cell = tuple[str, str | float]


def _head(page: Page, present: Sequence[Category]) -> list[str]:
    head = [
        *page.rows[0].labels,
        "source",
        "trainable",
        "peak",
        "where",
        "fits on",
        "held",
        *(c.value for c in present),
    ]
    head += page.rows[0].figures
    return head + (["error"] if any(row.error is not None for row in page.rows) else [])


def _line(page: Page, row: Row, source: str, present: Sequence[Category]) -> list[Cell]:
    footprint = row.found[source]
    peak = footprint.peak
    card = fits_on(peak.total + row.beyond)
    cells: list[Cell] = [(str(value), value) for value in row.labels.values()]
    cells += [(source, source), (f"{row.trainable:,}", row.trainable)]
    cells += [(in_words(peak.total), peak.total), (where(peak), where(peak))]
    cells.append((f"{card} GiB", card) if card else (f"more than {CARDS_GIB[-1]} GiB", CARDS_GIB[-1] + 1))
    cells.append((in_words(sum(footprint.held.values())), sum(footprint.held.values())))
    for count in _numbers(peak.bytes, present):
        cells.append((in_words(count) if count else "", count))
    cells += [(f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}", value) for value in row.figures.values()]
    if any(other.error is not None for other in page.rows):
        cells.append((f"{row.error:+.2%}", row.error) if row.error is not None and source == "predicted" else ("", ""))
    return cells


# The same as text.


def _csv(page: Page) -> str:
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    by_category = [f"{category.value.replace(' ', '_')}_bytes" for category in Category]
    peak_columns = ["peak_bytes", "peak_phase", "peak_block", "peak_module", "fits_on_gib", "held_bytes"]
    labels, figures = list(page.rows[0].labels), list(page.rows[0].figures)
    table.writerow([*labels, "source", "trainable_parameters", *peak_columns, *by_category, "beyond_bytes", *figures])
    for row in page.rows:
        for source, footprint in row.found.items():
            peak = footprint.peak
            at = [peak.total, peak.phase.value, peak.block, peak.module, fits_on(peak.total + row.beyond)]
            counts = _numbers(peak.bytes, list(Category))
            held = sum(footprint.held.values())
            ends = [row.beyond, *row.figures.values()]
            table.writerow([*row.labels.values(), source, row.trainable, *at, held, *counts, *ends])
    return stream.getvalue()


def _markdown(page: Page, picture: str) -> str:
    """The findings, and the peaks of the contenders side by side."""
    names = list(dict.fromkeys(str(row.labels[page.series]) for row in page.rows))
    lines: dict[tuple[str | int, ...], dict[str, str]] = {}
    places = {label: {value: i for i, value in enumerate(values)} for label, values in page.filters.items()}
    for row in page.rows:
        key = tuple(row.labels[label] for label in page.filters)
        error = f" (predicted {row.error:+.1%})" if row.error is not None else ""
        lines.setdefault(key, {})[str(row.labels[page.series])] = in_words(row.peak_bytes) + error
    ordered = sorted(lines.items(), key=lambda line: [places[f][v] for f, v in zip(places, line[0], strict=True)])
    table = [[*page.filters, *names], ["---"] * len(page.filters) + ["---:"] * len(names)]
    table += [[*map(str, key), *(peaks.get(name, "") for name in names)] for key, peaks in ordered]
    parts = [
        f"# {page.title}",
        "\n".join(f"- {sentence}" for sentence in page.sentences),
        f"![{page.title}]({picture})",
        "Peak of one step on one device:",
        "\n".join(f"| {' | '.join(cells)} |" for cells in table),
        *page.notes,
        "\n".join(f"- {name}: {text}" for name, text in page.ran.items()),
    ]
    return "\n\n".join(parts) + "\n"
