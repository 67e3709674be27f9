"""What the published benchmarks share: datasets by name, each a folder of its own, with a known number of classes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from snell_dist.config import ConfigError, Problem, nearest
from snell_dist.data import DataSection


class BenchmarkSection(DataSection):
    """`classes`: of each published dataset. `marker`: a file that every dataset's folder has."""

    classes: ClassVar[Mapping[str, int]] = {}
    spellings: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    inside: ClassVar[tuple[str, ...]] = ()  # folders that may stand between
    marker: ClassVar[str] = ""

    root: str = Field(description="the folder that holds the datasets' folders")
    dataset: str = Field(description="a dataset of the benchmark, or any folder with a classes.txt")
    image_size: int = Field(224, ge=1, description="pixels a side")
    normalisation: Literal["imagenet", "half", "clip"] = Field(
        "imagenet", description="mean and deviation of each channel"
    )

    def folder(self) -> Path:
        """The dataset's own, which may be the root itself. ConfigError where there is none."""
        root = Path(self.root)
        names = self.spellings.get(self.dataset, (self.dataset,))
        places = [base / name for base in (root, *(root / f for f in self.inside)) for name in names]
        found = next((place for place in places if place.is_dir()), root if (root / self.marker).is_file() else None)
        if found is not None:
            return found
        there = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        if self.dataset not in self.classes:
            known = [*self.classes, *there]
            message = f"no such dataset{nearest(self.dataset, known)} (allowed: {', '.join(known)})"
            raise ConfigError(Problem("data.dataset", message, self.dataset))
        message = f"has no folder {' or '.join(names)}" if root.is_dir() else "no such folder"
        raise ConfigError(Problem("data.root", f"{message}; snell data check says what is missing", self.root))

    def title(self, benchmark: str) -> str:
        """What a protocol card calls the data."""
        return (
            f"{benchmark} {self.dataset}"
            if self.dataset in self.classes
            else f"{self.dataset}, laid out as {benchmark}"
        )

    def class_count(self) -> int | None:
        return self.classes.get(self.dataset)

    def class_names(self, folder: Path) -> list[str]:
        """From classes.txt, where there is one, or their numbers. UserError where the count is not the dataset's."""
        from snell_dist.data import _files

        known = self.classes.get(self.dataset)
        if known is None or (folder / "classes.txt").exists():
            return _files.class_names(folder / "classes.txt", known)
        return [f"class {i}" for i in range(known)]
