"""Memory reports: the page in a real browser, and the same figures as text and as a picture."""

import csv
import io
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from snell_dist.config import UserError
from snell_dist.footprint import OUTSIDE, Category, Footprint, Moment, Owner, Phase, add
from snell_dist.memory.gpus import GIB, MIB, in_words
from snell_dist.report.memory import CARDS_GIB, COLOURS, Page, Row, fits_on, write

BROWSER = shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("CI"), reason="chromium is not installed; CI installs it"
)
METHODS = ("SNELL-8", "LoRA-8", "full")
BATCHES = (8, 1, 32)
BACKBONES = {"ViT-B/16": 12, "ViT-L/16": 24}


def footprint(depth: int, batch: int, trains: int) -> Footprint:
    """A made-up step: activations pile up and go, a temporary rises in the last block's backward."""
    held = {Category.FROZEN: depth * 28 * MIB, Category.TRAINABLE: trains, Category.OPTIMIZER: 2 * trains}
    block = 14 * batch * MIB
    blocks = [f"blocks.{i}" for i in range(depth)]
    moments = [
        Moment(Phase.FORWARD, name, f"{name}.mlp.fc1", add(held, {Category.ACTIVATIONS: block * (i + 1)}))
        for i, name in enumerate(blocks)
    ]
    for i, name in reversed([*enumerate(blocks)]):
        more = {Category.ACTIVATIONS: block * (i + 1), Category.ADAPTER: 9 * MIB, Category.GRADIENTS: trains // (i + 1)}
        moments.append(Moment(Phase.BACKWARD, name, f"{name}.mlp.fc2", add(held, more)))
    moments.append(Moment(Phase.STEP, OUTSIDE, OUTSIDE, add(held, {Category.GRADIENTS: trains})))
    owners = [Owner(f"{name}.mlp.act", name, Category.ACTIVATIONS, block) for name in blocks]
    owners += [Owner(f"{name}.mlp.fc1", name, Category.FROZEN, 28 * MIB) for name in blocks]
    return Footprint(moments, held, sorted(owners, key=lambda owner: -owner.bytes))


def row(method: str, backbone: str, batch: int, remat: str = "none") -> Row:
    depth = BACKBONES[backbone] // (1 if remat == "none" else 4)
    trains = depth * (28 if method == "full" else 1 + METHODS.index(method)) * MIB
    labels = {"method": method, "backbone": backbone, "batch": batch, "remat": remat}
    return Row(labels, trains // 4, predicted=footprint(depth, batch, trains), figures={"wire MiB": trains / MIB})


def page(**changes: Any) -> Page:
    rows = [row(m, b, n) for b in BACKBONES for n in BATCHES for m in METHODS]
    rows += [row(m, "ViT-L/16", 8, "block") for m in METHODS]
    ran = {"date": "2026-11-28", "machine": "a laptop", "versions": "torch 2.14", "command": "python x.py"}
    whole = Page("Memory", ran, ["SNELL-8 peaks at 1.5 GiB, 58 % of full."], rows, "method", "batch", "engine: {}\n")
    return replace(whole, **changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "memory"
    write(page(), out)
    return out.with_suffix(".html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def shown(browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """The page as a reader has it; in the end there was no word on the console and nothing was asked for."""
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    heard: list[str] = []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on("request", lambda request: heard.append(request.url))
    tab.goto(file.as_uri())
    expect(tab.locator(".chart > .plot-container")).to_have_count(7)
    yield tab
    tab.close()
    assert heard == [file.as_uri()]


def bars(tab: Any) -> list[str]:
    """What is written at the end of each bar."""
    return tab.eval_on_selector_all("#stack .annotation-text", "all => all.map(one => one.textContent)")


def expected(method: str, backbone: str = "ViT-B/16", batch: int = 8, remat: str = "none") -> Footprint:
    return row(method, backbone, batch, remat).predicted  # type: ignore[return-value]


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_on_any_screen(browser: Any, written: Path, width: int, scheme: str) -> None:
    with shown(browser, written, width, scheme) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
        assert bars(tab) == [in_words(expected(method).peak_bytes) for method in METHODS]
        paper, ink = (tab.evaluate(f"getComputedStyle(document.body).{key}") for key in ("backgroundColor", "color"))
        light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (paper, ink)]
        assert (light[0] > light[1]) == (scheme == "light")
        assert tab.locator("#stack .ytick text").first.evaluate("one => one.style.fill") == ink


@needs_browser
def test_a_click_on_a_category_hides_it_in_every_chart(browser: Any, written: Path) -> None:
    names = "place => place.data.filter(trace => trace.name === 'saved activations').length"
    with shown(browser, written) as tab:
        charts = ["#stack", "[data-line='0']", "[data-line='1']", "[data-layers='0']", "[data-layers='1']"]
        assert [tab.eval_on_selector(chart, names) for chart in charts] == [1] * 5
        entry = tab.get_by_role("button", name="saved activations").first
        entry.click()
        assert [tab.eval_on_selector(chart, names) for chart in charts] == [0] * 5
        rest = [expected(m).peak_bytes - expected(m).peak.bytes[Category.ACTIVATIONS] for m in METHODS]
        assert bars(tab) == [in_words(count) for count in rest]
        assert entry.get_attribute("aria-pressed") == "false"
        entry.click()
        assert bars(tab) == [in_words(expected(method).peak_bytes) for method in METHODS]


@needs_browser
def test_a_click_on_a_legend_hides_a_line(browser: Any, written: Path) -> None:
    visible = "place => place.data.filter(trace => trace.visible !== 'legendonly').map(trace => trace.name)"
    with shown(browser, written) as tab:
        assert tab.eval_on_selector("#growth", visible) == [*METHODS]
        tab.locator("#growth").scroll_into_view_if_needed()
        box = tab.locator("#growth .legendtoggle").nth(1).bounding_box()
        tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        expect(tab.locator("#growth .scatterlayer .trace")).to_have_count(2)
        assert tab.eval_on_selector("#growth", visible) == ["SNELL-8", "full"]


@needs_browser
def test_a_click_on_a_heading_sorts(browser: Any, written: Path) -> None:
    peaks = [r.peak_bytes for r in page().rows]
    column = "rows => rows.map(row => Number(row.cells[6].dataset.key))"
    with shown(browser, written) as tab:
        assert tab.eval_on_selector_all("#figures tbody tr", column) == peaks
        head = tab.locator("#figures th button").nth(6)
        head.click()
        assert tab.eval_on_selector_all("#figures tbody tr", column) == sorted(peaks)
        head.click()
        assert tab.eval_on_selector_all("#figures tbody tr", column) == sorted(peaks, reverse=True)
        assert tab.locator("#figures th[aria-sort=descending]").inner_text().strip().startswith("peak")


@needs_browser
def test_choices_lead_to_what_there_is(browser: Any, written: Path) -> None:
    """Recomputation was run for one backbone and one batch only: choosing it chooses those too."""
    with shown(browser, written) as tab:
        tab.select_option("[data-label=batch]", label="32")
        assert bars(tab) == [in_words(expected(method, batch=32).peak_bytes) for method in METHODS]
        tab.select_option("[data-label=remat]", label="block")
        assert bars(tab) == [in_words(expected(method, "ViT-L/16", 8, "block").peak_bytes) for method in METHODS]
        assert [
            tab.locator(f"[data-label={label}] option:checked").inner_text() for label in ("backbone", "batch")
        ] == [
            "ViT-L/16",
            "8",
        ]


@needs_browser
def test_the_time_line_is_the_footprints(browser: Any, written: Path) -> None:
    with shown(browser, written) as tab:
        tab.select_option("[data-side='1']", label="full")
        whole = expected("full")
        drawn = tab.eval_on_selector("[data-line='1']", "place => place.data.at(-1).y")
        assert drawn[:-1] == pytest.approx([m.total / GIB for m in whole.moments], abs=1e-3)
        words = tab.locator("[data-line='1'] .annotation-text").all_text_contents()
        assert "".join(words).count("forward") == 1 and any(
            f"peak {in_words(whole.peak_bytes)}" in text and "backward, blocks.11" in text.replace("\n", "")
            for text in words
        )
        layers = tab.eval_on_selector("[data-layers='1']", "place => place.data.map(trace => [trace.name, trace.y])")
        assert [name for name, _ in layers] == ["frozen parameters", "saved activations"]
        assert layers[1][1] == pytest.approx([14 * 8] * 12)
        first = tab.locator("[data-owners='1'] tbody tr").first.inner_text().split("\t")
        assert first == ["blocks.*.mlp.act (12)", "saved activations", in_words(12 * 8 * 14 * MIB)]


@needs_browser
def test_the_front_is_of_what_nothing_beats(browser: Any, tmp_path: Path) -> None:
    front = "place => place.data.find(trace => trace.mode === 'lines').x"
    rows = [row(method, "ViT-B/16", 8) for method in METHODS]
    worse = replace(rows[0], labels=rows[0].labels | {"method": "worse"}, trainable=rows[0].trainable - 1)
    for against, best in ((None, {r.trainable for r in rows}), ("wire MiB", {rows[0].figures["wire MiB"]})):
        write(page(rows=[*rows, worse], against=against), tmp_path / "front")
        with shown(browser, tmp_path / "front.html") as tab:
            assert set(tab.eval_on_selector("#pareto", front)) == best


@needs_browser
def test_light_and_dark_by_hand_and_on_paper(browser: Any, written: Path, tmp_path: Path) -> None:
    with shown(browser, written, scheme="dark") as tab:
        background = "getComputedStyle(document.body).backgroundColor"
        dark = tab.evaluate(background)
        tab.click("#theme")
        assert tab.evaluate(background) == "rgb(255, 255, 255)"
        tab.click("#theme")
        assert tab.evaluate(background) == dark
        width = tab.locator("#stack .main-svg").first.get_attribute("width")
        tab.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)
        assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "page.pdf").read_bytes())) >= 3
        expect(tab.locator("#stack .main-svg").first).to_have_attribute("width", width)
        assert tab.evaluate(background) == dark


@needs_browser
def test_what_was_predicted_stands_beside_what_was_measured(browser: Any, tmp_path: Path) -> None:
    rows = [replace(row(m, "ViT-B/16", 8), measured=expected(m, batch=9)) for m in METHODS]
    write(page(rows=rows), tmp_path / "both")
    with shown(browser, tmp_path / "both.html") as tab:
        wanted = [in_words(expected(m, batch=batch).peak_bytes) for m in METHODS for batch in (8, 9)]
        assert bars(tab) == wanted
        assert tab.locator("#figures tbody tr").count() == 2 * len(METHODS)
        error = expected("SNELL-8").peak_bytes / expected("SNELL-8", batch=9).peak_bytes - 1
        assert tab.locator("#figures tbody tr").first.inner_text().endswith(f"{error:+.2%}")
        assert tab.locator("#growth .legendtoggle").count() == len(METHODS)


@needs_browser
def test_names_in_it_are_text(browser: Any, tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=document.title='owned'>"
    rows = [replace(r, labels=r.labels | {"method": f"{evil}{r.labels['method']}"}) for r in page().rows[:3]]
    write(page(rows=rows, config=evil, title=evil, sentences=[evil]), tmp_path / "evil")
    with shown(browser, tmp_path / "evil.html") as tab:
        assert tab.title() == evil
        assert tab.locator("img").count() == 0
        assert tab.locator("#figures tbody td").first.inner_text() == f"{evil}SNELL-8"


def test_it_asks_for_nothing(written: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", written.read_text(), flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=|url\(|@import""", text)
    assert "default-src 'none'" in text
    assert "http" not in text.replace("http-equiv", "")


def test_the_table_holds_every_figure(written: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(written.with_suffix(".csv").read_text())))
    assert len(lines) == len(page().rows)
    for line, said in zip(lines, page().rows, strict=True):
        peak = expected(*said.labels.values()).peak  # type: ignore[arg-type]
        assert {key: line[key] for key in said.labels} == {key: str(value) for key, value in said.labels.items()}
        assert int(line["peak_bytes"]) == peak.total
        assert (line["peak_phase"], line["peak_block"], line["peak_module"]) == (peak.phase, peak.block, peak.module)
        by_category = {c: int(line[f"{c.value.replace(' ', '_')}_bytes"]) for c in Category}
        assert {c: count for c, count in by_category.items() if count} == peak.bytes
        assert float(line["wire MiB"]) == said.figures["wire MiB"]


def test_the_text_has_every_peak(written: Path) -> None:
    text = written.with_suffix(".md").read_text()
    assert "- SNELL-8 peaks at 1.5 GiB, 58 % of full." in text
    assert "| ViT-L/16 | 8 | block | " + " | ".join(
        in_words(expected(method, "ViT-L/16", 8, "block").peak_bytes) for method in METHODS
    ) in text  # fmt: skip
    assert "![Memory](memory.png)" in text and "- machine: a laptop" in text


def test_the_picture_has_the_categories_colours(written: Path) -> None:
    picture = np.array(Image.open(written.with_suffix(".png")).convert("RGB"))
    for category in (Category.FROZEN, Category.TRAINABLE, Category.OPTIMIZER, Category.ACTIVATIONS):
        wanted = [int(COLOURS[category][i : i + 2], 16) for i in (1, 3, 5)]
        assert (picture == wanted).all(2).sum() > 500, category


def test_the_smallest_card_that_holds_it() -> None:
    assert [fits_on(count) for count in (0, 16 * GIB, 16 * GIB + 1, 80 * GIB, 141 * GIB + 1)] == [16, 16, 24, 80, None]
    whole = row("LoRA-8", "ViT-B/16", 8)
    for beyond, card in ((0, "16 GiB"), (CARDS_GIB[-1] * GIB, "more than 141 GiB")):
        cells = write_table(page(rows=[replace(whole, beyond=beyond)]))
        assert card in cells


def write_table(said: Page) -> str:
    from snell_dist.report import memory

    return memory._html(said).partition('<table class="sortable"')[2].partition("</table>")[0]


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
SIGHT = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


@pytest.mark.parametrize("sight", SIGHT)
def test_every_eye_tells_the_categories_apart(sight: str) -> None:
    """By CIE 1976 colour difference; 2.3 is just noticeable, 10 is seen at a glance."""
    seen = {}
    for category, colour in COLOURS.items():
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        x, y, z = np.array(
            [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        ) @ np.clip(np.array(SIGHT[sight]) @ linear, 0, 1) / [0.9505, 1.0, 1.089]  # fmt: skip
        f = [v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z)]
        seen[category] = np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
    assert set(seen) == set(Category)
    assert min(float(np.linalg.norm(seen[a] - seen[b])) for a, b in itertools.combinations(seen, 2)) > 10


def test_rows_that_say_nothing_or_other_things_are_refused() -> None:
    with pytest.raises(ValueError, match="neither a prediction nor a measurement"):
        Row({"method": "lora"}, 1)
    rows = page().rows
    for wrong in ([*rows, replace(rows[0], labels={"method": "x"})], [replace(rows[0], labels={"method": "x"})]):
        with pytest.raises(ValueError, match="every row needs the same labels, method and batch among them"):
            page(rows=wrong)


@pytest.mark.parametrize("library", ["jinja2", "plotly.offline", "matplotlib"])
def test_a_missing_library_is_one_line(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        UserError, match=rf"{library.split('.')[0]} is not installed: pip install 'snell_dist\[report\]'"
    ):
        write(page(), tmp_path / "memory")
    assert not any(tmp_path.iterdir())
