"""Tar shards: where each image lies in them, said by an index or found by a scan, and images read from there.

An index has columns, with one entry a sample: its name, its label, and the byte range and checksum of its image. What
is read by byte range has any order, so shards are as exact as a list of files.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from snell_dist.config import Section, UserError, first_line

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from torch import Tensor

INDEX = "index.json"
BLOCK = 512  # bytes; a tar ends with two blocks of zeros
UNKNOWN = -1  # a checksum that nobody has taken

Count = Annotated[int, Field(ge=0)]


class Damaged(UserError):
    """A shard that is missing, cut off or not what its index says."""


class Shard(Section):
    """One tar file and its samples. `sha256` and `crc32` are known where we packed it."""

    file: str
    samples: Count
    bytes: Count
    sha256: str | None = None
    names: list[str]
    labels: list[Count]
    offsets: list[Count]
    sizes: list[Count]
    crc32: list[Count] | None = None

    @model_validator(mode="after")
    def _equally_long(self) -> Shard:
        columns = (self.names, self.labels, self.offsets, self.sizes, self.crc32)
        if any(column is not None and len(column) != self.samples for column in columns):
            raise ValueError(f"must have {self.samples} entries in each column")
        return self


class AllLabelled(Section):
    """What trains where a benchmark's protocol trains on val as well: places in train followed by val."""

    about: dict[str, str]
    order: list[Count]


class Index(Section):
    """What a pack says of itself. `source` is the packed data section, whose transforms the images go through."""

    format: int = Field(ge=1, le=1)
    source: dict[str, Any]
    classes: list[str]
    about: dict[str, str]
    all_labelled: AllLabelled | None = None
    train: list[Shard] = Field([])
    val: list[Shard] = Field([])
    test: list[Shard] = Field([])

    @model_validator(mode="after")
    def _consistent(self) -> Index:
        for shard in (*self.train, *self.val, *self.test):
            if Path(shard.file).name != shard.file:
                raise ValueError(f"has the shard {shard.file!r}: must be a name without a folder")
            if max(shard.labels, default=0) >= len(self.classes):
                raise ValueError(f"has labels in {shard.file} above its {len(self.classes)} classes")
        trained = sum(shard.samples for shard in (*self.train, *self.val))
        if self.all_labelled is not None and max(self.all_labelled.order, default=0) >= trained:
            raise ValueError(f"names a sample in all_labelled.order above its {trained}")
        return self


def scan(file: Path, name: str, classes: int, images: Sequence[str], label: str) -> Shard:
    """Finds the samples of a shard: members with the same name up to the first dot, as webdataset has it.

    `name`: what the shard is called. Damaged where the tar does not go on to its end: tarfile itself, and so
    webdataset, stops there in silence. UserError where a sample is not an image and a label from 0 to classes - 1.
    """
    names, labels, offsets, sizes = [], [], [], []
    samples = _samples(file, name)
    with file.open("rb") as stream:
        for key, members in samples:
            image = next((members[e] for e in images if e in members), None)
            if image is None or label not in members:
                lacks = f"no image ({', '.join(images)})" if image is None else f"no label ({label})"
                raise UserError(f"{name}: sample {key!r} has {lacks}; it has {', '.join(members)}")
            stream.seek(members[label].offset_data)
            text = stream.read(members[label].size).strip()
            if not text.isdigit() or int(text) >= classes:
                said = text[:20].decode(errors="replace")
                raise UserError(f"{name}: sample {key!r}: label {said!r}: must be from 0 to {classes - 1}")
            names.append(f"{name}/{image.name}")
            labels.append(int(text))
            offsets.append(image.offset_data)
            sizes.append(image.size)
    return Shard(
        file=name, samples=len(names), bytes=file.stat().st_size,
        names=names, labels=labels, offsets=offsets, sizes=sizes,
    )  # fmt: skip


def _samples(file: Path, name: str) -> list[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Keys and, by their extensions, members."""
    from webdataset.tariterators import base_plus_ext

    found: list[tuple[str, dict[str, tarfile.TarInfo]]] = []
    end, size = 0, 0
    try:
        size = file.stat().st_size
        with tarfile.open(file, "r:") as tar:  # without compression, which has no byte ranges
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                key, extension = base_plus_ext(member.name)
                if key is None or not member.isfile():
                    continue
                if not found or found[-1][0] != key:
                    found.append((key, {}))
                if found[-1][1].setdefault(extension.lower(), member) is not member:
                    raise UserError(f"{name}: has {member.name!r} twice")
        with file.open("rb") as stream:
            stream.seek(end)
            rest = stream.read()
        if end <= size - 2 * BLOCK and not any(rest):
            return found
    except FileNotFoundError:
        raise Damaged(f"{name}: no such shard") from None
    except tarfile.TarError:
        if end == 0 and size:
            raise Damaged(f"{name}: is no tar, or a compressed one, or damaged at byte 0") from None
    raise Damaged(f"{name}: is damaged or cut off at byte {min(end, size)}, after {len(found)} samples")


def check(file: Path, shard: Shard) -> None:
    """Damaged where the file is missing or not as long as its index says."""
    size = file.stat().st_size if file.is_file() else None
    if size != shard.bytes:
        what = "no such shard" if size is None else f"has {size} bytes, not {shard.bytes}"
        raise Damaged(f"{file}: {what}; it holds {shard.samples} samples")


def check_content(file: Path, shard: Shard) -> None:
    """Damaged where a byte of the file is not what its index says."""
    check(file, shard)
    found = sha256(file)
    if shard.sha256 not in (None, found):
        raise Damaged(f"{file}: has SHA-256 {found[:12]}, not {shard.sha256[:12]}; it holds {shard.samples} samples")


def sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


@dataclass(frozen=True)
class Tars:
    """See `Images` for the contract. An image whose checksum is known is checked whenever it is read."""

    files: Sequence[Path]
    where: np.ndarray  # [N, 4]: file, offset, size, checksum or UNKNOWN
    names: Sequence[str]
    labels: Sequence[int]
    transform: Callable[[Image.Image], Tensor]
    augments: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.picture(index)), self.labels[index]

    def picture(self, index: int) -> Image.Image:
        from PIL import Image, UnidentifiedImageError

        number, offset, size, checksum = self.where[index].tolist()
        said = f"{self.files[number]}: byte {offset}: {self.names[index]}"
        try:
            with self.files[number].open("rb", buffering=0) as stream:
                stream.seek(offset)
                content = stream.read(size)
        except OSError as error:
            raise UserError(f"{said}: cannot be read: {error.strerror}") from None
        if len(content) < size:
            raise UserError(f"{said}: the shard was cut off")
        if checksum not in (UNKNOWN, zlib.crc32(content)):
            raise UserError(f"{said}: is not what was packed (its CRC-32 differs); the shard is damaged")
        try:
            with Image.open(io.BytesIO(content)) as image:
                return image.convert("RGB")
        except UnidentifiedImageError:
            raise UserError(f"{said}: is no image") from None
        except Exception as error:  # PIL's decoders raise all kinds
            raise UserError(f"{said}: is no whole image ({first_line(error)})") from None

    def name(self, index: int) -> str:
        return self.names[index]

    def file(self, index: int) -> Path | None:
        return None


def tars(
    shards: Sequence[tuple[Path | None, Shard]],
    transform: Callable[[Image.Image], Tensor],
    augments: bool = False,
    order: Sequence[int] | None = None,
) -> Tars:
    """The shards' images, in this order; without those of shards that have no file."""
    import numpy as np

    names = [name for _, shard in shards for name in shard.names]
    labels = [label for _, shard in shards for label in shard.labels]
    tables = [
        np.column_stack([[n] * shard.samples, shard.offsets, shard.sizes, shard.crc32 or [UNKNOWN] * shard.samples])
        for n, (_, shard) in enumerate(shards)
    ]
    where = np.concatenate(tables).astype(np.int64)
    kept = [i for i in (range(len(names)) if order is None else order) if shards[where[i, 0]][0] is not None]
    files = [file or Path(shard.file) for file, shard in shards]
    return Tars(files, where[kept], [names[i] for i in kept], [labels[i] for i in kept], transform, augments)
