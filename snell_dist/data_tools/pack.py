"""Packs any data source into tar shards, with an index that `data: {name: webdataset, root: DIR}` trains from.

DIR/
    train-000000.tar ...   val-...   test-...    NUMBER.jpg (or .png) and NUMBER.cls, for any reader of webdataset's
    index.json             classes, source, and of each shard size and SHA-256, of each image name, label and place

The same images give the same bytes. JPEG, PNG and WebP files are stored as they are, other images as PNG.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from webdataset import TarWriter

from snell_dist import log
from snell_dist.config import UserError
from snell_dist.data import DataSection, Images, Splits
from snell_dist.data._tar import INDEX, AllLabelled, Index, Shard, scan, sha256
from snell_dist.files import new_folder

AS_THEY_ARE = ("jpg", "jpeg", "png", "webp")
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Limit:
    """When a shard is full: it is closed once it holds so many images, or so many bytes of them."""

    images: float = float("inf")
    bytes: float = float("inf")

    @staticmethod
    def parse(said: str) -> Limit:
        """`256MiB`, or a number of images. UserError where it is neither."""
        match = re.fullmatch(r"([1-9]\d*)(KiB|MiB|GiB)?", said)
        if match is None:
            raise UserError(
                f"--shard-size = {said!r}: expected a size such as 256MiB, or a number of images such as 1000"
            )
        number, unit = int(match[1]), match[2]
        return Limit(bytes=number * UNITS[unit]) if unit else Limit(images=number)


def pack(section: DataSection, to: Path, limit: Limit) -> Index:
    """Writes the folder, whole or not at all. UserError where it exists, or where an image cannot be read."""
    section.transforms()  # before anything else: who reads the pack will need them
    if to.exists():
        raise UserError(f"--to {to}: exists and stays as it is; name another folder")
    splits, whole = section.load(all_labelled=False), section.load(all_labelled=True)
    with new_folder(to) as folder:
        index = Index(
            format=1,
            source=_settings(section),
            classes=splits.classes,
            about=dict(splits.about),
            all_labelled=_all_labelled(splits, whole) if whole.val_trains else None,
            train=_write(folder, "train", splits.train, limit),
            val=_write(folder, "val", splits.val, limit),
            test=_write(folder, "test", splits.test, limit),
        )
        _synced(folder / INDEX, index.model_dump_json().encode())
    return index


def _settings(section: DataSection) -> dict[str, object]:
    """What the section says beyond batches and workers; its images are in the pack's own folder now."""
    own = section.model_dump(exclude=set(DataSection.model_fields) - {"name"})
    return own | ({"root": "."} if "root" in own else {})


def _all_labelled(splits: Splits, whole: Splits) -> AllLabelled:
    names = [images.name(i) for images in (splits.train, splits.val) for i in range(len(images))]
    places = {name: place for place, name in enumerate(names)}
    order = [places[whole.train.name(i)] for i in range(len(whole.train))]
    return AllLabelled(about=dict(whole.about), order=order)


def _write(folder: Path, split: str, images: Images, limit: Limit) -> list[Shard]:
    shards: list[Shard] = []
    first = 0
    while first < len(images):
        file = folder / f"{split}-{len(shards):06d}.tar"
        shards.append(_shard(file, images, first, limit))
        first += shards[-1].samples
        log.info(f"packed {file.name}: {shards[-1].samples} images, {shards[-1].bytes / 2**20:.1f} MiB")
    return shards


def _shard(file: Path, images: Images, first: int, limit: Limit) -> Shard:
    """Images from `first` on, until the shard is full; then looked up in what was written."""
    checksums: list[int] = []
    with file.open("wb") as stream:
        held = 0
        with TarWriter(stream, encoder=False, mtime=0) as tar:
            for index in range(first, len(images)):
                if len(checksums) >= limit.images or held >= limit.bytes:
                    break
                extension, content = _stored(images, index)
                label = str(images.labels[index]).encode()
                tar.write({"__key__": f"{index:09d}", extension: content, "cls": label})
                checksums.append(zlib.crc32(content))
                held += len(content)
        stream.flush()
        os.fsync(stream.fileno())
    last = first + len(checksums)
    found = scan(file, file.name, max(images.labels[first:last]) + 1, AS_THEY_ARE, "cls")
    assert found.labels == list(images.labels[first:last])
    names = [images.name(i) for i in range(first, last)]
    return found.model_copy(update={"names": names, "sha256": sha256(file), "crc32": checksums})


def _stored(images: Images, index: int) -> tuple[str, bytes]:
    """Extension and content of an image. It is decoded in any case, so that a pack holds whole images only."""
    picture, file = images.picture(index), images.file(index)
    if file is not None and (extension := file.suffix.lower().lstrip(".")) in AS_THEY_ARE:
        return extension, file.read_bytes()
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "png", stream.getvalue()


def _synced(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
