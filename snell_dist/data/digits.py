"""Handwritten digits that scikit-learn ships: 1,797 real images of 8 x 8 pixels, no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (test part).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from snell_dist.data import DataSection, Preprocessing, Splits, Transforms

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VAL, TEST = 0.2, 0.3  # fractions of each class
LEVEL_8 = 120  # the middle of 16 levels, in a picture of 8 bits


class Digits(DataSection):
    in_memory: ClassVar[bool] = True

    name: Literal["digits"]
    classes: list[int] = Field(list(range(10)), min_length=2, description="which digits")
    image_size: int = Field(8, ge=8, description="pixels a side; larger ones are interpolated")
    channels: Literal[1, 3] = Field(1, description="3: the same three times")

    @field_validator("classes")
    @classmethod
    def _digits(cls, classes: list[int]) -> list[int]:
        if len(set(classes)) != len(classes) or not set(classes) <= set(range(10)):
            raise ValueError("must be different digits from 0 to 9")
        return classes

    def class_count(self) -> int | None:
        return len(self.classes)

    def load(self, all_labelled: bool) -> Splits:
        """Train, val and test hold 50, 20 and 30 % of each class, split once and for all (not by the run's seed)."""
        import numpy as np
        import torch
        from sklearn.datasets import load_digits

        inks, targets = load_digits(return_X_y=True)
        inks = inks.reshape(-1, 8, 8)
        images = _scaled(torch.tensor(inks), self.image_size, self.channels)
        parts: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
        for label, digit in enumerate(self.classes):
            members = np.random.default_rng([1998, digit]).permutation(np.flatnonzero(targets == digit))
            val, test = round(VAL * len(members)), round(TEST * len(members))
            parts["val"] += [(i, label) for i in members[:val]]
            parts["test"] += [(i, label) for i in members[val : val + test]]
            parts["train"] += [(i, label) for i in members[val + test :]]
        return Splits(
            train=_part(images, inks, parts["train"]),
            val=_part(images, inks, parts["val"]),
            test=_part(images, inks, parts["test"]),
            classes=[WORDS[digit] for digit in self.classes],
            image_shape=(self.channels, self.image_size, self.image_size),
            preprocessing=self.transforms().preprocessing,
            about={
                "dataset": f"digits {self.classes}",
                "split": "50 % train, 20 % val, 30 % test of each class",
                **self.transforms().about,
            },
        )

    def transforms(self) -> Transforms:
        pixels = functools.partial(_pixels, size=self.image_size, channels=self.channels)
        about = {
            "resize": f"bilinear to {self.image_size}" if self.image_size > 8 else "none",
            "normalisation": "0..16 to -1..1",
        }
        grey = (LEVEL_8 / 255,) * self.channels
        said = Preprocessing(self.image_size, self.channels, "squeeze", "bilinear", mean=grey, std=grey)
        return Transforms(training=pixels, evaluation=pixels, augments=False, about=about, preprocessing=said)


@dataclass(frozen=True)
class _InMemory:
    images: Tensor
    inks: np.ndarray  # [N, 8, 8], 0..16
    labels: list[int]
    numbers: list[int]  # in scikit-learn's file
    augments: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]

    def picture(self, index: int) -> Image.Image:
        from PIL import Image

        return Image.fromarray((self.inks[index] * 15).astype("uint8"))  # 16 levels, exactly

    def name(self, index: int) -> str:
        return f"digit_{self.numbers[index]:04d}"

    def file(self, index: int) -> Path | None:
        return None


def _scaled(inks: Tensor, size: int, channels: int) -> Tensor:
    """Ink 0..16 [N, 8, 8] to -1..1 [N, channels, size, size]."""
    from torch.nn.functional import interpolate

    images = inks.float().unsqueeze(1) / 8 - 1
    if size > 8:
        images = interpolate(images, size=(size, size), mode="bilinear")
    return images.expand(-1, channels, -1, -1)


def _pixels(picture: Image.Image, size: int, channels: int) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    return _scaled(pil_to_tensor(picture.convert("L")) / 15, size, channels)[0]


def _part(images: Tensor, inks: np.ndarray, members: list[tuple[int, int]]) -> _InMemory:
    numbers, labels = [number for number, _ in members], [label for _, label in members]
    return _InMemory(images[numbers], inks[numbers], labels, numbers)
