"""FGVC: five fine-grained datasets with the splits of VPT (Jia et al., ECCV 2022).

    ROOT/<dataset>/train.json  val.json  test.json      a file's name to its class id
    ROOT/<dataset>/images/  Images/  or the folder      the files
    ROOT/<dataset>/classes.txt                          names, one a line; optional

train.json trains, val.json chooses. Ids are sorted and numbered from 0 over all three files; the released code does so
for each file alone, which is the same where every class is in every file, as it is in the published splits. Oxford
Flowers is also read from its original files, whose division is the same. Other data in this layout works too: a
folder with a classes.txt may have any name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from snell_dist.config import UserError
from snell_dist.data import Splits, Transforms
from snell_dist.data._benchmark import BenchmarkSection

# dataset: (classes, train, val, test images), of VPT's files
DATASETS = {
    "cub": (200, 5394, 600, 5794),
    "nabirds": (555, 21536, 2393, 24633),
    "oxfordflower": (102, 1020, 1020, 6149),
    "stanforddog": (120, 10800, 1200, 8580),
    "stanfordcar": (196, 7329, 815, 8041),
}
SPELLINGS = {
    "cub": ("CUB_200_2011", "cub", "CUB"),
    "nabirds": ("nabirds", "NABirds"),
    "oxfordflower": ("OxfordFlower", "OxfordFlowers", "oxfordflower", "oxford_flowers", "flowers-102"),
    "stanforddog": ("StanfordDogs", "Stanford-dogs", "stanforddog", "stanford_dogs", "dogs"),
    "stanfordcar": ("StanfordCars", "Stanford-cars", "stanfordcar", "stanford_cars", "cars"),
}
HOW = {
    "cub": "Caltech-UCSD Birds 200-2011, its archive's folder images",
    "nabirds": "NABirds of the Cornell Lab of Ornithology, its folder images",
    "oxfordflower": "Oxford 102 Flowers: jpg, imagelabels.mat and setid.mat",
    "stanforddog": "Stanford Dogs, its archive's folder Images",
    "stanfordcar": "Stanford Cars: cars_train and cars_test",
}
SPLIT_FILES = "train.json, val.json and test.json, which the authors of VPT publish"


class Fgvc(BenchmarkSection):
    classes: ClassVar[Mapping[str, int]] = {dataset: counts[0] for dataset, counts in DATASETS.items()}
    spellings: ClassVar[Mapping[str, tuple[str, ...]]] = SPELLINGS
    inside: ClassVar[tuple[str, ...]] = ("fgvc",)
    marker: ClassVar[str] = "train.json"

    name: Literal["fgvc"]
    augment: bool = Field(True, description="training: random crops, mirrored, colours shaken; else as in evaluation")

    def load(self, all_labelled: bool) -> Splits:
        from snell_dist.data import _files

        folder = self.folder()
        names = self.class_names(folder)
        images, lists = self.lists(folder, len(names))
        transforms = self.transforms()
        return Splits(
            train=_files.Files(images, *lists["train"], transforms.training, transforms.augments),
            val=_files.Files(images, *lists["val"], transforms.evaluation),
            test=_files.Files(images, *lists["test"], transforms.evaluation),
            classes=names,
            image_shape=(3, self.image_size, self.image_size),
            preprocessing=transforms.preprocessing,
            about={
                "dataset": self.title("FGVC"),
                "split": "train, val and test of VPT",
                **transforms.about,
            },
        )

    def transforms(self) -> Transforms:
        from snell_dist.data import _transforms

        size, said = self.image_size, _transforms.centre(self.image_size, self.normalisation)
        plain = _transforms.plain(said)
        about = {
            "resize": f"shorter side to {int(_transforms.SHORTER * size)}, bilinear; centre {size} x {size}",
            "normalisation": self.normalisation,
            "augmentation": _transforms.AUGMENTATION if self.augment else "none",
        }
        training = _transforms.augmented(size, self.normalisation) if self.augment else plain
        return Transforms(training, plain, self.augment, about, said)

    def lists(self, folder: Path, count: int) -> tuple[Path, dict[str, tuple[list[str], list[int]]]]:
        """Where the images are, and names and labels of each split. UserError where a file is missing or wrong."""
        if self.dataset == "oxfordflower" and not (folder / "train.json").exists() and (folder / "setid.mat").exists():
            return folder, _flowers(folder)
        said = {split: _json(folder / f"{split}.json") for split in ("train", "val", "test")}
        ids = sorted({label for entries in said.values() for label in entries.values()})
        if len(ids) > count:
            raise UserError(f"{folder}: its split files have {len(ids)} classes, not {count}: is it {self.dataset}?")
        if len(ids) < count and ids[-1] - ids[0] >= count:
            raise UserError(f"{folder}: its split files have classes {ids[0]} to {ids[-1]}, not {count} of them")
        numbers = {label: i for i, label in enumerate(ids)} if len(ids) == count else {i: i - ids[0] for i in ids}
        places = (folder / name for name in ("images", "Images"))
        images = next((place for place in places if place.is_dir()), folder)
        return images, {split: (list(e), [numbers[label] for label in e.values()]) for split, e in said.items()}


def _json(file: Path) -> dict[str, int]:
    """A split file: names to class ids."""
    from snell_dist.data import _files

    content = _files.text(file)
    try:
        said: Any = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: is not valid JSON: {error.msg}") from None
    if not isinstance(said, dict) or not said:
        raise UserError(f"{file}: expected an object of file names and class ids")
    found = {}
    for name, label in said.items():
        if not str(label).isdecimal():
            line = next((n for n, text in enumerate(content.splitlines(), 1) if json.dumps(name) in text), 1)
            raise UserError(f"{file}:{line}: {name!r}: {label!r}: a class id must be a whole number, 0 or more")
        found[name] = int(label)
    return found


def _flowers(folder: Path) -> dict[str, tuple[list[str], list[int]]]:
    """The division in the original files, as torchvision's reader takes it."""
    from scipy.io import loadmat

    try:
        labels = loadmat(folder / "imagelabels.mat", squeeze_me=True)["labels"]
        ids = loadmat(folder / "setid.mat", squeeze_me=True)
        keys = {"train": "trnid", "val": "valid", "test": "tstid"}
        parts = {split: [int(i) for i in ids[key]] for split, key in keys.items()}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{folder}: its .mat files cannot be read: {error}") from None
    return {
        s: ([f"jpg/image_{i:05d}.jpg" for i in part], [int(labels[i - 1]) - 1 for i in part])
        for s, part in parts.items()
    }
