"""`snell report`: one page of real runs, opened in a real browser."""

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import train, typed
from PIL import Image
from safetensors.numpy import load_file
from sklearn.metrics import confusion_matrix

from snell_dist.config import UserError
from snell_dist.report import charts, write

BROWSER = shutil.which("chromium")
needs_browser = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("CI"), reason="chromium is not installed; CI installs it"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs, one of them chosen on test, and one that was left unfinished."""
    out = tmp_path_factory.mktemp("runs")
    train(out, "method.rank=4", "train.eval_every=2", folder=out / "b")
    marked = ["method.name=linear", "protocol.select=paper_compat", "train.eval_every=2", "optim.lr=0.01"]
    train(out, *marked, folder=out / "a")
    train(out, "method.rank=2", folder=out / "open")
    (out / "open" / "summary.json").unlink()
    with (out / "open" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')  # as a crash leaves it
    return out


def browse(page: Path, *options: str) -> str:
    """The page as Chromium shows it, after its scripts."""
    assert BROWSER is not None, "chromium is missing"
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout


def with_script(page: Path, script: str) -> Path:
    """The page and, after it, a script of the test's."""
    other = page.with_name("scripted.html")
    other.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return other


@needs_browser
def test_a_browser_shows_every_run(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = typed("report", runs, "--out", page)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{page}: 3 runs, ")
    shown = browse(page, "--dump-dom")
    text = re.sub(r"<[^>]+>", " ", shown)
    for name in ("a", "b"):
        summary = json.loads((runs / name / "summary.json").read_text())
        assert f"{100 * summary['test_accuracy']:.1f}" in text
        assert summary["protocol"]["chosen"] in text
        assert summary["protocol"]["data_sha256"] in text
    assert "† chosen on the test images" in text
    assert "unfinished, 6 steps so far" in text
    assert "method:\n  name: linear" in text, "the configuration, whole"
    assert len(list((runs / "b" / "mistakes").glob("*.png"))) == 12


@needs_browser
def test_the_table_sorts(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    write([runs], page)
    click = "document.querySelectorAll('#runs th button')[8].click();"
    for times in (1, 2):
        shown = browse(with_script(page, click * times), "--dump-dom")
        body = shown.partition("<tbody>")[2].partition("</tbody>")[0]
        order = re.findall(r'<a href="#run\d">(\w+)</a>', body)
        sizes = {name: json.loads((runs / name / "summary.json").read_text())["trainable_parameters"] for name in "ab"}
        expected = sorted("ab", key=lambda name: sizes[name], reverse=times == 2)
        assert order == [*expected, "open"], "what has no figure comes last"
        assert f'aria-sort="{["ascending", "descending"][times - 1]}"' in shown


def test_the_page_asks_for_nothing(runs: Path, tmp_path: Path) -> None:
    write([runs], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "default-src 'none'" in page
    assert "http://" not in page and "https://" not in page


@needs_browser
def test_names_are_text_not_markup(runs: Path, tmp_path: Path) -> None:
    evil = "<script>document.title='owned'</script>"
    shutil.copytree(runs / "b", tmp_path / "runs" / "b")
    file = tmp_path / "runs" / "b" / "summary.json"
    summary = json.loads(file.read_text())
    file.write_text(json.dumps(summary | {"classes": [evil, *summary["classes"][1:]]}))
    write([tmp_path / "runs"], tmp_path / "report.html")
    shown = browse(tmp_path / "report.html", "--dump-dom")
    assert "<title>owned" not in shown
    assert "&lt;script&gt;document.title" in shown


def test_confusion_is_scikit_learns(runs: Path) -> None:
    said = load_file(runs / "b" / "test_predictions.safetensors")
    counts = charts.confusion(said["label"], said["predicted"], 5)
    assert np.array_equal(counts, confusion_matrix(said["label"], said["predicted"], labels=range(5)))


def test_the_heat_map_has_a_pixel_for_each_field() -> None:
    import io

    counts = np.diag(np.full(30, 4)) + np.eye(30, k=3, dtype=int)
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(charts.heat(counts)))))
    assert picture.shape == (30, 30, 3)
    white = (picture == 255).all(2)
    assert np.array_equal(~white, counts > 0)
    red, blue = picture[0, 3].astype(int), picture[0, 0].astype(int)
    assert red[0] > red[2] and blue[2] > blue[0]


def test_lines_of_odd_series() -> None:
    assert charts.lines({"loss": []}, "t") == ""
    for points in ([(1, float("nan")), (2, 0.5)], [(5, 1.0)], [(1, 2.0), (2, 2.0)], [(1, -3.0), (9, 1e9)]):
        drawn = charts.lines({"<b>": points}, "<t>")
        assert "nan" not in drawn.replace("aria-label", "") and "&lt;t&gt;" in drawn
        assert "<b>" not in drawn


def test_runs_of_two_folders_keep_their_names_apart(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "other" / "a")
    (tmp_path / "other" / "table.md").write_text("| | lora |\n| --- | ---: |\n| svhn | 1.0 |\n")
    write([runs, tmp_path / "other"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for name in (runs / "a", tmp_path / "other" / "a"):
        assert page.count(f">{name}</a>") == 1
    assert f"<h2>{tmp_path / 'other'}</h2>" in page


DAMAGE = {
    "summary.json": ('{"a":', "is damaged (Expecting value"),
    "run.json": ("[{", "is damaged (Expecting property name"),
    "config.yaml": ("a: [1", "is damaged (while parsing a flow sequence)"),
    "mistakes/mistakes.json": ("[", "is damaged (Expecting value"),
    "test_predictions.safetensors": ("x", "not a whole safetensors file"),
}


@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_a_damaged_file_of_a_run_is_one_line(name: str, runs: Path, tmp_path: Path) -> None:
    content, said = DAMAGE[name]
    file = tmp_path / "runs" / "a" / name
    shutil.copytree(runs / "a", tmp_path / "runs" / "a")
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        write([tmp_path / "runs"], tmp_path / "report.html")
    assert f"{file}: {said}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_file_of_something_else_is_one_line(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "a", tmp_path / "runs" / "a")
    (tmp_path / "runs/a/config.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=rf"report: {tmp_path}/runs/a: is no whole run folder \(it lacks 'method'\)"):
        write([tmp_path / "runs"], tmp_path / "report.html")
    for out, said in ((tmp_path, "is a folder"), (tmp_path / "no/x.html", "its folder is not there")):
        with pytest.raises(UserError, match=f"--out {out}: {said}; name a file"):
            write([runs], out)


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for folder, said in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no run folder")):
        done = typed("report", folder, "--out", tmp_path / "report.html")
        assert (done.returncode, done.stderr) == (2, f"snell: report: {folder}: {said}\n")
    assert not (tmp_path / "report.html").exists()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"jinja2 is not installed: pip install 'snell_dist\[report\]'"):
        write([tmp_path], tmp_path / "report.html")
