"""WebDataset: images in tar shards, in this project's own packs or in shards that you have.

    root: DIR                            a pack, which `snell data pack` writes; a folder, or its URL
    train: shards/train-{000..099}.tar   shards of any origin, so for val and test; with classes

A pack trains with its source's images, labels, names and transforms. Every shard is a file and is read by byte range,
so order, continuation and evaluation are as exact as with a list of files. What is no file (pipe:, http://, gs://) is
fetched once into `cache`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, model_validator

from snell_dist import log
from snell_dist.config import ConfigError, Plugin, Problem, UserError, check, first_line
from snell_dist.data import DataSection, Splits, Transforms
from snell_dist.data._tar import INDEX, Damaged, Index, Shard

SPLITS: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")
T = TypeVar("T")
Opened = list[tuple[Path | None, Shard]]  # a shard without its file is damaged


class Webdataset(DataSection):
    name: Literal["webdataset"]
    root: str | None = Field(None, description="a pack; or say train, val, test and classes")
    train: str | None = Field(None, description="shards, with {000..099} for many: files, pipe:, http://, gs://, hf://")
    val: str | None = None
    test: str | None = None
    classes: int | str | None = Field(None, description="how many, or a file with their names, one a line")
    images: str = Field("jpg;jpeg;png;webp", description="extensions of images in your shards; the first one counts")
    label: str = Field("cls", description="extension of the label, a whole number from 0")
    cache: str | None = Field(None, description="a folder that keeps what is fetched of streams")
    max_damaged: int = Field(0, ge=0, description="how many damaged shards are skipped, with a warning")
    image_size: int | None = Field(None, ge=1, description="pixels a side; null, here and below: as packed")
    resize: Literal["centre", "squeeze"] | None = None
    normalisation: Literal["imagenet", "half", "clip"] | None = None
    augment: bool | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Webdataset:
        said = [key is not None for key in (self.train, self.val, self.test, self.classes)]
        if any(said) if self.root is not None else not all(said):
            raise ValueError("must say either root, or train, val, test and classes")
        return self

    def load(self, all_labelled: bool) -> Splits:
        from snell_dist.data import _tar

        damaged: list[str] = []
        index, opened = self._pack(self.root, damaged) if self.root is not None else self._shards(damaged)
        self._tolerate(damaged)
        transforms = self._transforms(index.source)
        trained, order, about = opened["train"], None, index.about
        if all_labelled and index.all_labelled is not None:
            trained, order, about = trained + opened["val"], index.all_labelled.order, index.all_labelled.about
        train = _tar.tars(trained, transforms.training, transforms.augments, order)
        val, test = (_tar.tars(opened[split], transforms.evaluation) for split in ("val", "test"))
        for split, images in zip(SPLITS, (train, val, test), strict=True):
            if not len(images):
                raise UserError(f"{self.root or getattr(self, split)}: {split} has no images")
        channels, height, width = test[0][0].shape
        return Splits(
            train,
            val,
            test,
            classes=index.classes,
            image_shape=(channels, height, width),
            preprocessing=transforms.preprocessing,
            about={**about, **transforms.about, **({"missing": "; ".join(damaged)} if damaged else {})},
            val_trains=order is not None,
        )

    def _pack(self, root: str, damaged: list[str]) -> tuple[Index, dict[str, Opened]]:
        from snell_dist.data import _fetch, _tar

        def opened(shard: Shard) -> Path:
            content = partial(_tar.check_content, shard=shard)
            file = _fetch.local(f"{root.rstrip('/')}/{shard.file}", self.cache, content)
            _tar.check(file, shard)
            return file

        index = _read(_fetch.local(f"{root.rstrip('/')}/{INDEX}", self.cache, _read))
        files: dict[str, Opened] = {
            s: [(_whole(partial(opened, shard), damaged), shard) for shard in getattr(index, s)] for s in SPLITS
        }
        return index, files

    def _shards(self, damaged: list[str]) -> tuple[Index, dict[str, Opened]]:
        from snell_dist.data import _fetch, _files, _tar

        names = (
            [f"class {i}" for i in range(self.classes)]
            if isinstance(self.classes, int)
            else _files.class_names(Path(str(self.classes)), None)
        )

        def opened(url: str) -> tuple[Path | None, Shard]:
            scan = partial(_tar.scan, name=url, classes=len(names), images=self.images.split(";"), label=self.label)
            file = _fetch.local(url, self.cache, scan)
            return file, scan(file)

        files: dict[str, Opened] = {}
        for split in SPLITS:
            found = [_whole(partial(opened, url), damaged) for url in _expanded(split, getattr(self, split))]
            files[split] = [shard for shard in found if shard is not None]
        about = {"dataset": "tar shards", "split": f"train {self.train}, val {self.val}, test {self.test}"}
        source = {"name": "image_folder", "root": "."}  # whose transforms are for any images
        return Index(format=1, source=source, classes=names, about=about), files

    def _tolerate(self, damaged: list[str]) -> None:
        if len(damaged) > self.max_damaged:
            message = f"{len(damaged)} cannot be used: mend or fetch what is damaged, or allow so many"
            raise UserError("\n".join([*damaged, f"data.max_damaged = {self.max_damaged}: {message}"]))
        for line in damaged:
            log.info(f"warning: skipped, so these samples are lost: {line}")

    def _transforms(self, source: dict[str, Any]) -> Transforms:
        """Those of the packed source, but for what is said here."""
        kind = Plugin("data").find(str(source["name"]))
        keys = ("image_size", "resize", "normalisation", "augment")
        said = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        foreign = [
            Problem(f"data.{key}", f"the packed source {source['name']} has no such setting", value)
            for key, value in said.items()
            if key not in kind.model_fields
        ]
        if foreign:
            raise ConfigError(*foreign)
        try:
            section = check({**source, **said}, kind)
        except ConfigError as error:
            raise ConfigError(*(replace(p, key=f"data.{p.key}") for p in error.problems)) from None
        assert isinstance(section, DataSection)
        return section.transforms()


def _whole(opened: Callable[[], T], damaged: list[str]) -> T | None:
    """What is opened; or None, and one more line of damage."""
    try:
        return opened()
    except Damaged as error:
        damaged.append(str(error))
        return None


def _expanded(split: str, said: str) -> list[str]:
    from webdataset.shardlists import expand_urls

    try:
        urls = expand_urls(said)
    except ValueError as error:
        raise ConfigError(
            Problem(f"data.{split}", f"its braces cannot be expanded: {first_line(error)}", said)
        ) from None
    if len(set(urls)) < len(urls):
        raise ConfigError(Problem(f"data.{split}", "names a shard twice", said))
    return urls


def _read(file: Path) -> Index:
    """UserError, naming the file, where it is no index."""
    try:
        index = check(json.loads(file.read_bytes()), Index)
        Plugin("data").find(str(index.source.get("name")))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file, so {file.parent} is no pack of snell data pack") from None
    except ConfigError as error:
        first = error.problems[0]
        raise UserError(f"{file}: is no index of a pack: {first.key or 'it'}: {first.message}") from None
    except ValueError as error:
        raise UserError(f"{file}: is no valid JSON: {first_line(error)}") from None
    except KeyError as error:
        raise UserError(f"{file}: source.name: {Plugin('data').unknown(error.args[0])}") from None
    return index
