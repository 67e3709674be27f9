"""What a model of two towers needs beside its weights to name what is on a picture: classes, and captions of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snell_dist.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

FILE = "zero_shot.json"


@dataclass(frozen=True)
class ZeroShot:
    classes: list[str]
    templates: list[str]  # captions of a class, `{}` its name

    def captions(self) -> list[str]:
        """Of every class by every template, class by class."""
        return [template.format(name) for name in self.classes for template in self.templates]

    def logits(
        self,
        images: Callable[[Tensor], Tensor],
        texts: Callable[[Tensor], Tensor],
        tokens: Tensor,
        scale: Tensor,
    ) -> Callable[[Tensor], Tensor]:
        """From images to logits [B, classes]; images, texts: towers, to features of length 1; tokens of `captions`."""
        from snell_dist.tasks.contrastive import class_directions

        directions = class_directions(texts, tokens.unflatten(0, (len(self.classes), -1)))

        def logits(pictures: Tensor) -> Tensor:
            features = images(pictures)
            return scale.to(features.device) * features @ directions.to(features.device).t()

        return logits


def write(folder: Path, told: ZeroShot) -> None:
    write_atomic(folder / FILE, json.dumps(asdict(told), indent=2))


def read(folder: Path) -> ZeroShot | None:
    """None where the folder's model is of one tower."""
    file = folder / FILE
    return ZeroShot(**json.loads(file.read_text())) if file.is_file() else None
