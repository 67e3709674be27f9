"""Labelled image files: a list of names and labels under a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snell_dist.config import UserError, first_line

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from snell_dist.data._transforms import Transform


@dataclass(frozen=True)
class Files:
    """See `Images` for the contract."""

    root: Path
    names: Sequence[str]  # relative to root
    labels: Sequence[int]
    transform: Transform
    augments: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.picture(index)), self.labels[index]

    def picture(self, index: int) -> Image.Image:
        return read(self.file(index))

    def name(self, index: int) -> str:
        return self.names[index]

    def file(self, index: int) -> Path:
        return self.root / self.names[index]


def read(file: Path, advice: str = "; snell data check finds all such files") -> Image.Image:
    """The picture in RGB. UserError, with advice, where it is missing, empty, cut off or no image."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{file}: no such image") from None
    except Exception as error:  # PIL's decoders raise all kinds
        empty = file.is_file() and file.stat().st_size == 0
        what = "is empty" if empty else f"is no whole image ({first_line(error)})"
        raise UserError(f"{file}: {what}{advice}") from None


def lines(file: Path, classes: int) -> tuple[list[str], list[int]]:
    """Names and labels of a split file of lines `relative/path label`. UserError with the line that is wrong."""
    names, labels = [], []
    for number, line in enumerate(text(file).splitlines(), 1):
        name, space, label = line.rpartition(" ")
        if not space or not label.isdecimal():
            raise UserError(f"{file}:{number}: {line!r}: expected a relative path, one space and a label")
        if int(label) >= classes:
            raise UserError(f"{file}:{number}: label {label}: must be from 0 to {classes - 1}")
        names.append(name)
        labels.append(int(label))
    if not names:
        raise UserError(f"{file}: is empty")
    return names, labels


def text(file: Path) -> str:
    """A split file's content. UserError where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file{_beside(file)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {first_line(error)}") from None


def class_names(file: Path, count: int | None) -> list[str]:
    """One a line. UserError where there are not `count`."""
    names = text(file).splitlines()
    if count is not None and len(names) != count:
        raise UserError(f"{file}: has {len(names)} classes, not {count}")
    return names


def _beside(file: Path) -> str:
    """What is there instead."""
    if not file.parent.is_dir():
        return f" (nor its folder {file.parent})"
    there = sorted(p.name for p in file.parent.iterdir() if p.suffix == file.suffix)[:5]
    return f" (beside it: {', '.join(there)})" if there else ""
