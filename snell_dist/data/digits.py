"""Handwritten digits that scikit-learn ships: 1,797 real images of 8 x 8 pixels, no download.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (test part).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from snell_dist.data import DataSection, Splits

if TYPE_CHECKING:
    from torch import Tensor

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VAL, TEST = 0.2, 0.3  # fractions of each class


class Digits(DataSection):
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

    def load(self) -> Splits:
        """Train, val and test hold 50, 20 and 30 % of each class, split once and for all (not by the run's seed)."""
        import numpy as np
        import torch
        from sklearn.datasets import load_digits

        images, targets = load_digits(return_X_y=True)
        images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # 0..16 to -1..1
        parts: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
        for label, digit in enumerate(self.classes):
            members = np.random.default_rng([1998, digit]).permutation(np.flatnonzero(targets == digit))
            val, test = round(VAL * len(members)), round(TEST * len(members))
            parts["val"] += [(i, label) for i in members[:val]]
            parts["test"] += [(i, label) for i in members[val : val + test]]
            parts["train"] += [(i, label) for i in members[val + test :]]
        if self.image_size > 8:
            images = torch.nn.functional.interpolate(images, size=(self.image_size,) * 2, mode="bilinear")
        images = images.expand(-1, self.channels, -1, -1)
        datasets = {
            name: _InMemory(images[[i for i, _ in part]], [label for _, label in part]) for name, part in parts.items()
        }
        shape = (self.channels, self.image_size, self.image_size)
        return Splits(**datasets, classes=[WORDS[digit] for digit in self.classes], image_shape=shape)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _InMemory:
    images: Tensor
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]
