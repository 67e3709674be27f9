"""`snell data check` and `manifest`, as a user calls them."""

import hashlib
import json
from pathlib import Path

import pytest
from conftest import typed
from mini_layouts import write_fgvc, write_vtab

from snell_dist.data import fgvc, vtab
from snell_dist.data_tools.manifest import FORMAT


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_vtab(tmp_path / "data" / "vtab-1k", ["svhn", "cifar"])
    write_fgvc(tmp_path / "data" / "fgvc", ["cub"])
    return tmp_path / "data"


def test_what_is_there_and_what_is_missing(data: Path) -> None:
    done = typed("data", "check", data, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [(f["benchmark"], f["dataset"]) for f in said["found"]] == [
        ("vtab", "cifar"), ("vtab", "svhn"), ("fgvc", "cub"),
    ]  # fmt: skip
    svhn = said["found"][1]["splits"]
    assert {name: split["images"] for name, split in svhn.items()} == {"train": 40, "val": 10, "test": 40}
    lines = (data / "vtab-1k/svhn/test.txt").read_text().replace(" ", "\t")
    assert svhn["test"]["list_sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    missing = {gap["dataset"] for gap in said["missing"]}
    assert missing == (set(vtab.DATASETS) | set(fgvc.DATASETS)) - {"cifar", "svhn", "cub"}
    text = typed("data", "check", data).stdout
    assert f"train 40 of 10 classes {svhn['train']['list_sha256'][:12]}" in text
    assert "the published one has train 800, val 200, test 26,032 images" in text
    assert "to be had as NABirds of the Cornell Lab" in text


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_every_broken_image_is_named(data: Path, quick: list[str]) -> None:
    """A file that is cut off has a whole header, so only the full look finds it."""
    images = data / "vtab-1k/svhn/images/test"
    for number in range(7):
        (images / f"{number:04d}.png").write_bytes(b"")
    whole = (images / "0060.png").read_bytes()
    (images / "0060.png").write_bytes(whole[: len(whole) // 2])
    (images / "0041.png").unlink()
    done = typed("data", "check", data / "vtab-1k/svhn", *quick)
    assert done.returncode == 2
    assert f"train: {images}/0000.png: is empty" in done.stdout
    assert "train: and 2 more images" in done.stdout
    assert f"val: {images}/0041.png: no such image" in done.stdout
    assert (f"test: {images}/0060.png: is no whole image" in done.stdout) is (not quick)
    assert "BROKEN" in done.stdout


def test_lists_that_are_wrong(data: Path) -> None:
    whole = data / "vtab-1k/cifar/train800val200.txt"
    whole.write_text("".join(whole.read_text().splitlines(keepends=True)[:-1]))
    (data / "fgvc/CUB_200_2011/val.json").unlink()
    done = typed("data", "check", data)
    assert done.returncode == 2
    assert "train800val200 is not train800 and val200 together" in done.stdout
    assert "val.json: no such file (beside it: test.json, train.json)" in done.stdout


def test_a_manifest_finds_every_change(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    assert typed("data", "manifest", data, "--out", file).stdout == f"{file}: 3 datasets\n"
    assert typed("data", "check", data, "--against", file).returncode == 0
    image = data / "fgvc/CUB_200_2011/images/part/0003.png"
    image.write_bytes((image.parent / "0004.png").read_bytes())
    (data / "vtab-1k/cifar").rename(data / "elsewhere")
    test = data / "vtab-1k/svhn/test.txt"
    test.write_text("".join(reversed(test.read_text().splitlines(keepends=True))))
    done = typed("data", "check", data, "--against", file)
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        "fgvc cub train: its files differ", "vtab cifar: is gone", "vtab svhn test: its list differs",
    ]  # fmt: skip
    image.write_bytes(b"")
    done = typed("data", "manifest", data, "--out", tmp_path / "other.json")
    assert done.returncode == 2
    assert "cub: broken" in done.stderr
    assert not (tmp_path / "other.json").exists()


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "not.json").write_text("{}")
    (tmp_path / "cut.json").write_text(f'{{"format": "{FORMAT}", "found": [{{"benchmark": "vtab"}}]}}')
    for arguments, said in (
        (["check", tmp_path], "holds no dataset of VTAB-1k or FGVC"),
        (["check", tmp_path / "none"], "holds no dataset of VTAB-1k or FGVC"),
        (["check", tmp_path, "--against", tmp_path / "no.json"], "no such manifest"),
        (["check", tmp_path, "--against", tmp_path / "not.json"], "is no manifest of this version"),
        (["check", tmp_path, "--against", tmp_path / "cut.json"], "cut.json: is damaged; record it anew"),
        (["manifest", tmp_path, "--out", tmp_path], f"--out {tmp_path}: is a folder; name a file"),
        (["manifest", tmp_path, "--out", tmp_path / "no/m.json"], "no/m.json: its folder is not there; name a file"),
    ):
        done = typed("data", *arguments)
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
