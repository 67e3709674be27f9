"""Your own images: a folder for each class.

    ROOT/train/<class>/*    ROOT/val/<class>/*    ROOT/test/<class>/*

Without val a part of each class of train is held out, always the same one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from snell_dist.config import ConfigError, Problem, UserError, first_line
from snell_dist.data import DataSection, Splits, Transforms

HELD_OUT = 0.1


class ImageFolder(DataSection):
    name: Literal["image_folder"]
    root: str = Field(description="the folder with train, test and, if there is one, val")
    image_size: int = Field(224, ge=1, description="pixels a side")
    resize: Literal["centre", "squeeze"] = Field(
        "centre", description="evaluation: the centre of the picture, or all of it squeezed to a square"
    )
    normalisation: Literal["imagenet", "half", "clip"] = Field(
        "imagenet", description="mean and deviation of a channel"
    )
    augment: bool = Field(True, description="training: random crops, mirrored, colours shaken; else as in evaluation")

    def load(self, all_labelled: bool) -> Splits:
        from snell_dist.data import _files

        root = Path(self.root)
        listed = {split: _listed(root / split) for split in ("train", "val", "test") if (root / split).is_dir()}
        missing = [split for split in ("train", "test") if split not in listed]
        if missing:
            message = "no such folder" if not root.is_dir() else f"has no folder {' and no folder '.join(missing)}"
            raise ConfigError(Problem("data.root", message, self.root))
        classes = sorted({name for name, _ in listed["train"]})
        for split, found in listed.items():
            foreign = sorted({name for name, _ in found} - set(classes))
            if foreign:
                raise UserError(f"{root / split / foreign[0]}: train has no class of this name")
        if "val" not in listed:
            listed["train"], listed["val"] = _held_out(listed["train"])
        transforms = self.transforms()
        number = {name: i for i, name in enumerate(classes)}

        def files(split: str) -> _files.Files:
            names, labels = [file for _, file in listed[split]], [number[name] for name, _ in listed[split]]
            if split == "train":
                return _files.Files(root, names, labels, transforms.training, transforms.augments)
            return _files.Files(root, names, labels, transforms.evaluation)

        return Splits(
            train=files("train"),
            val=files("val"),
            test=files("test"),
            classes=classes,
            image_shape=(3, self.image_size, self.image_size),
            preprocessing=transforms.preprocessing,
            about={
                "dataset": root.name,
                "split": "folders"
                if (root / "val").is_dir()
                else f"folders; val is {HELD_OUT:.0%} of each class of train",
                **transforms.about,
            },
        )

    def transforms(self) -> Transforms:
        from snell_dist.data import _transforms

        said = getattr(_transforms, self.resize)(self.image_size, self.normalisation)
        plain = _transforms.plain(said)
        about = {
            "resize": f"{self.resize} to {self.image_size}",
            "normalisation": self.normalisation,
            "augmentation": _transforms.AUGMENTATION if self.augment else "none",
        }
        training = _transforms.augmented(self.image_size, self.normalisation) if self.augment else plain
        return Transforms(training, plain, self.augment, about, said)


def _listed(folder: Path) -> list[tuple[str, str]]:
    """(class, file relative to the root) of every image, in torchvision's order. UserError where there is none."""
    from torchvision.datasets import ImageFolder as Reader

    try:
        found = Reader(str(folder), allow_empty=False)
    except (FileNotFoundError, OSError) as error:
        raise UserError(f"{folder}: {first_line(error)}") from None
    root = folder.parent
    return [(found.classes[label], Path(file).relative_to(root).as_posix()) for file, label in found.samples]


def _held_out(listed: list[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What stays and what is held out, chosen by class: every tenth of a fixed order."""
    import numpy as np

    train, val = [], []
    for name in sorted({n for n, _ in listed}):
        members = [item for item in listed if item[0] == name]
        order = np.random.default_rng(1998).permutation(len(members))
        cut = max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0
        val += [members[i] for i in sorted(order[:cut])]
        train += [members[i] for i in sorted(order[cut:])]
    return train, val
