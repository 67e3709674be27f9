"""VTAB-1k and FGVC in the layouts that people have; what is wrong is one line that names file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_layouts import digits, write_fgvc, write_vtab

from snell_dist.config import ConfigError, Plugin, UserError, check
from snell_dist.data import DataSection, Splits, fgvc, vtab


def load(source: str, all_labelled: bool = False, **settings: Any) -> Splits:
    section = check({"name": source, "image_size": 32, **settings}, Plugin("data").find(source))
    assert isinstance(section, DataSection)
    return section.load(all_labelled)


def names(images: Any) -> list[str]:
    return [images.name(i) for i in range(len(images))]


@pytest.mark.parametrize("below", ["", "vtab-1k"])
def test_vtab_trains_on_800_or_on_all_1000(below: str, tmp_path: Path) -> None:
    write_vtab(tmp_path / below, ["svhn"])
    held, whole = (load("vtab", all_labelled, root=str(tmp_path), dataset="svhn") for all_labelled in (False, True))
    assert [len(s) for s in (held.train, held.val, held.test)] == [40, 10, 40]
    assert names(whole.train) == names(held.train) + names(held.val)
    assert (held.val_trains, whole.val_trains) == (False, True)
    assert list(held.train.labels) == digits()[1][:40].tolist()
    image, label = held.test[0]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert label == digits()[1][50]
    assert len(held.classes) == 10
    assert held.sha256() != whole.sha256()


def test_every_dataset_has_the_published_counts() -> None:
    """Class counts as the released recipes have them; VTAB's groups are 7, 4 and 8 tasks."""
    import yaml

    recipes = yaml.safe_load((Path(__file__).parent.parent / "golden" / "recipes.yaml").read_text())
    ours = {**vtab.Vtab.classes, **fgvc.Fgvc.classes}
    assert ours == recipes["classes"]
    assert sorted(vtab.DATASETS) == sorted(task for group in recipes["vtab_groups"].values() for task in group)


@pytest.mark.parametrize("dataset", sorted(fgvc.DATASETS))
def test_fgvc_numbers_its_classes_from_0_and_finds_its_images(dataset: str, tmp_path: Path) -> None:
    write_fgvc(tmp_path, [dataset])
    splits = load("fgvc", root=str(tmp_path), dataset=dataset)
    assert list(splits.train.labels) == digits()[1][:40].tolist(), "ids from 1 become classes from 0"
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [40, 10, 40]
    assert splits.train.augments
    assert not splits.test.augments
    assert splits.train.picture(3).size == (40, 32)
    assert splits.train[3][0].shape == splits.test[3][0].shape == (3, 32, 32)
    plain = load("fgvc", root=str(tmp_path), dataset=dataset, augment=False)
    assert torch.equal(plain.train[0][0], plain.train[0][0])
    assert not plain.train.augments


def test_a_class_that_a_split_lacks_does_not_move_the_others(tmp_path: Path) -> None:
    """Renumbering each file alone, as released, would call the test's class 2 class 1."""
    write_fgvc(tmp_path, ["cub"])
    folder = tmp_path / "CUB_200_2011"
    (folder / "classes.txt").write_text("".join(f"bird {i}\n" for i in range(200)))
    said = json.loads((folder / "test.json").read_text())
    without = {name: label for name, label in said.items() if label != 2}
    (folder / "test.json").write_text(json.dumps(without))
    splits = load("fgvc", root=str(tmp_path), dataset="cub")
    assert list(splits.test.labels) == [label - 1 for label in without.values()]
    assert splits.classes[1] == "bird 1"


def test_flowers_are_read_from_their_original_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision's own reader does, but for its checksum of the whole archive."""
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    savemat(folder / "imagelabels.mat", {"labels": digits()[1][:30] + 1})
    savemat(folder / "setid.mat", {"trnid": [3, 1, 9, 20], "valid": [2, 30], "tstid": list(range(10, 20))})
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    ours = load("fgvc", root=str(tmp_path), dataset="oxfordflower")
    for split, mine in (("train", ours.train), ("val", ours.val), ("test", ours.test)):
        theirs = Flowers102(str(tmp_path), split)
        assert [str(folder / name) for name in names(mine)] == [str(file) for file in theirs._image_files]
        assert list(mine.labels) == [int(label) for label in theirs._labels]


def test_other_data_in_the_layout_has_a_classes_file(tmp_path: Path) -> None:
    write_vtab(tmp_path, ["svhn"])
    (tmp_path / "svhn").rename(tmp_path / "mine")
    (tmp_path / "mine" / "classes.txt").write_text("".join(f"digit {i}\n" for i in range(10)))
    assert load("vtab", root=str(tmp_path), dataset="mine").classes[3] == "digit 3"


def wrong(source: str, match: str, **settings: Any) -> None:
    with pytest.raises(UserError) as caught:
        splits = load(source, **settings)
        splits.test[0]
    assert "\n" not in str(caught.value)
    assert match in str(caught.value), caught.value


def test_what_is_wrong_with_vtab_is_one_line(tmp_path: Path) -> None:
    write_vtab(tmp_path, ["svhn", "cifar"])
    said = {"root": str(tmp_path), "dataset": "svhn"}
    wrong("vtab", "data.dataset = 'cifer': no such dataset, did you mean 'cifar'?", root=str(tmp_path), dataset="cifer")
    wrong("vtab", "data.root = ", root=str(tmp_path), dataset="dtd")
    wrong("vtab", "no such folder", root=str(tmp_path / "none"), dataset="dtd")
    test = tmp_path / "svhn" / "test.txt"
    good = test.read_text()
    test.write_text(good.replace("0050.png ", "0050.png"))
    wrong("vtab", f"{test}:1: 'images/test/0050.png", **said)
    test.write_text(good + "images/test/0051.png 10\n")
    wrong("vtab", f"{test}:41: label 10: must be from 0 to 9", **said)
    for label in ("²", "-1", "1.0"):
        test.write_text(good + f"images/test/0051.png {label}\n")
        wrong("vtab", f"{test}:41: 'images/test/0051.png {label}': expected a relative path, one space", **said)
    test.write_text("")
    wrong("vtab", f"{test}: is empty", **said)
    test.unlink()
    wrong("vtab", f"{test}: no such file (beside it: train800.txt", **said)
    test.write_text(good)
    (tmp_path / "svhn" / "classes.txt").write_text("one\ntwo\n")
    wrong("vtab", "has 2 classes, not 10", **said)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_vtab(tmp_path, ["svhn"])
    said = {"root": str(tmp_path), "dataset": "svhn"}
    file = tmp_path / "svhn" / "images" / "test" / "0050.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    wrong("vtab", f"{file}: is no whole image", **said)
    file.write_bytes(b"")
    wrong("vtab", f"{file}: is empty", **said)
    file.unlink()
    wrong("vtab", f"{file}: no such image", **said)


def test_what_is_wrong_with_fgvc_is_one_line(tmp_path: Path) -> None:
    write_fgvc(tmp_path, ["cub", "nabirds"])
    folder = tmp_path / "CUB_200_2011"
    said = {"root": str(tmp_path), "dataset": "cub"}
    (tmp_path / "nabirds" / "train.json").write_text(json.dumps({f"{i}.jpg": i for i in range(555)}))
    wrong("fgvc", "have 555 classes, not 200: is it cub?", root=str(tmp_path / "nabirds"), dataset="cub")
    good = (folder / "val.json").read_text()
    (folder / "val.json").write_text(good[:-10])
    wrong("fgvc", f"{folder / 'val.json'}:1: is not valid JSON", **said)
    (folder / "val.json").write_text('{\n"a.png": 1,\n"b.png": "two"\n}')
    wrong("fgvc", f"{folder / 'val.json'}:3: 'b.png': 'two': a class id must be", **said)
    (folder / "val.json").write_text("[]")
    wrong("fgvc", "expected an object", **said)
    (folder / "val.json").unlink()
    wrong("fgvc", "val.json: no such file (beside it: test.json, train.json)", **said)
    wrong("fgvc", "has no folder StanfordDogs or ", root=str(tmp_path), dataset="stanforddog")


def test_image_folders(tmp_path: Path) -> None:
    from PIL import Image

    images, labels = digits()
    for i in range(60):
        place = tmp_path / ("train" if i < 40 else "test") / f"digit {labels[i] % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(place / f"{i}.png")
    splits = load("image_folder", root=str(tmp_path))
    assert splits.classes == ["digit 0", "digit 1", "digit 2"]
    assert len(splits.val) == sum(max(1, round(0.1 * (labels[:40] % 3 == c).sum())) for c in range(3))
    assert not set(names(splits.train)) & set(names(splits.val))
    assert len(splits.train) + len(splits.val) == 40
    for part in (splits.train, splits.val, splits.test):
        assert [f"digit {label}" for label in part.labels] == [name.split("/")[1] for name in names(part)]
    (tmp_path / "test" / "digit 7").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "test" / "digit 7" / "x.png")
    wrong("image_folder", "digit 7: train has no class of this name", root=str(tmp_path))
    wrong("image_folder", "has no folder train and no folder test", root=str(tmp_path / "train"))


def test_a_key_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"roots.*did you mean 'root'"):
        load("vtab", roots="x", dataset="svhn")
