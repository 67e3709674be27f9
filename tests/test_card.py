"""Model cards: read again by huggingface_hub, their code run as printed, and nothing in them that is not known."""

from __future__ import annotations

import contextlib
import io
import platform
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from sklearn.datasets import load_digits

from snell_dist import backbones, card, finished, formats
from snell_dist.finished import Finished

HOSTILE = ["a|b", "<script>", "two\nlines", "---", "*", "[x](http://y)"]


@pytest.fixture(scope="module")
def run(finished: Path) -> Finished:
    from snell_dist.finished import read

    return read(finished)


def written(folder: Path, run: Finished, **summary: Any) -> ModelCard:
    """The card of the run as if it had said something else, by the hub's own reader."""
    folder.mkdir(exist_ok=True)
    changed = replace(run, summary={**run.summary, **summary})
    card.write(folder, changed, "timm", "timm", "import timm", "Proven.")
    return ModelCard.load(folder / "README.md")


def test_the_hub_reads_the_card_of_an_export(run: Finished, tmp_path: Path) -> None:
    formats.export(run.folder, "timm", tmp_path / "timm")
    read = ModelCard.load(tmp_path / "timm" / "README.md")
    data = read.data
    assert isinstance(data, ModelCardData)
    assert (data.library_name, data.pipeline_tag) == ("timm", "image-classification")
    assert data.license is None, "of a base that is only a file, none is known"
    assert data.base_model is None
    [result] = data.eval_results or []
    assert (result.metric_type, result.dataset_split) == ("accuracy", "test")
    assert result.metric_value == pytest.approx(run.summary["test_accuracy"], abs=5e-5)
    assert data.model_name == card.title(run)
    for said in (
        run.base_sha256, run.summary["protocol"]["data_sha256"], "protocol `val`", "1 look at the test images",
        "rank: 8", "sparsity: 0.9", f"torch {torch.__version__.split('+')[0]}", "MiB", "differ from the run's by",
        "five, six, seven, eight, nine", "not known here",
    ):  # fmt: skip
        assert said in read.text, said


def test_places_and_names_of_machines_stay_at_home(run: Finished, tmp_path: Path) -> None:
    whole = str(written(tmp_path, run))
    assert str(run.folder) not in whole
    assert str(run.folder.parent.parent) not in whole
    assert run.folder.parent.parent.name not in whole
    assert f" {platform.node()} " not in whole
    assert "adapter.safetensors" not in whole


@pytest.mark.parametrize(
    ("size", "said", "hub", "license"),
    [
        ("vit/base", "augreg_in21k", "timm/vit_base_patch16_224.augreg_in21k", "apache-2.0"),
        ("swin/base", "ms_in22k", "timm/swin_base_patch4_window7_224.ms_in22k", "mit"),
        ("clip/ViT-B-32", "laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", None),
        ("vit/base", "hub:someone/some-model@v2", "someone/some-model", None),
        ("vit/base", "weights/ViT-B_16.npz", None, None),
        ("vit/base", "no_such_tag", None, None),
        ("vit/base", None, None, None),
    ],
)
def test_a_base_that_is_known_by_name_is_named(
    size: str, said: str | None, hub: str | None, license: str | None, run: Finished, tmp_path: Path
) -> None:
    of_size = replace(run, config=run.config.model_copy(update={"backbone": backbones.section(size)}))
    read = written(tmp_path, of_size, base_weights=said)
    assert (read.data.base_model, read.data.license) == (hub, license)  # type: ignore[attr-defined]
    assert (hub or ("a file" if said and "/" in said else said or "random")) in read.text


def test_what_was_chosen_on_test_images_says_so(run: Finished, tmp_path: Path) -> None:
    protocol: Mapping[str, Any] = run.summary["protocol"]
    read = written(tmp_path, run, protocol={**protocol, "marked": True, "select": "paper_compat", "test_looks": 7})
    assert "7 looks at the test images" in read.text
    assert "**These weights were chosen on the test images**" in read.text
    [result] = read.data.eval_results or []  # type: ignore[attr-defined]
    assert result.metric_name == "accuracy (chosen on the test images)"


def test_names_are_text_whatever_is_in_them(run: Finished, tmp_path: Path) -> None:
    dataset = "a: b\n---\n# x | y"
    protocol = {**run.summary["protocol"], "dataset": dataset}
    read = written(tmp_path, run, classes=HOSTILE, protocol=protocol)
    [result] = read.data.eval_results or []  # type: ignore[attr-defined]
    assert result.dataset_name == dataset
    assert r"a\|b, \<script\>, two lines, ---, \*, \[x\](http://y)." in read.text
    assert not re.search(r"^(---|# x)", read.text, re.MULTILINE)
    rows = [line for line in read.text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}


def test_many_classes_are_counted_and_an_imported_run_has_no_starts(run: Finished, tmp_path: Path) -> None:
    bare = replace(run, folder=tmp_path / "nowhere")
    read = written(tmp_path, bare, classes=[f"c{i}" for i in range(1000)], peak_memory_mib=None)
    assert "to 1000 classes:\nc0, c1," in read.text
    assert "c29 and 970 more." in read.text


def says(folder: Path, monkeypatch: pytest.MonkeyPatch, size: int, mode: str) -> str:
    """What the card's own code prints, run in its folder beside a picture of a five."""
    ink = load_digits().images[5] * 15
    Image.fromarray(ink.astype("uint8")).resize((size, size)).convert(mode).save(folder / "picture.png")
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.no_grad():
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue().strip()


@pytest.mark.parametrize("name", ["timm", "hf", "delta"])
def test_the_code_of_a_card_runs_as_printed(
    name: str, run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.export(run.folder, name, tmp_path / name)
    best = formats.serve(run.folder)
    picture = Image.fromarray((load_digits().images[5] * 15).astype("uint8"))
    expected = run.classes[int(best.logits(best.prepare(picture).unsqueeze(0)).argmax())]
    printed = says(tmp_path / name, monkeypatch, 8, "L")
    assert printed == expected or printed.startswith(f"[Guess(name='{expected}'")


@pytest.mark.parametrize("name", ["open_clip", "hf"])
def test_the_code_for_two_towers_runs_as_printed(
    name: str, finished_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.export(finished_clip, name, tmp_path / name)
    data = ModelCard.load(tmp_path / name / "README.md").data
    assert data.pipeline_tag == "zero-shot-image-classification"  # type: ignore[attr-defined]
    assert says(tmp_path / name, monkeypatch, 32, "RGB") in finished.read(finished_clip).classes
