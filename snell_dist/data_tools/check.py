"""What of the published benchmarks a folder holds, whether it is whole, and how to obtain the rest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from snell_dist.config import ConfigError, Plugin, UserError, check
from snell_dist.data import Images, fgvc, vtab
from snell_dist.data._benchmark import BenchmarkSection
from snell_dist.data._files import Files, read

BENCHMARKS = "vtab", "fgvc"
SHOWN = 5  # broken images named for each split


@dataclass(frozen=True)
class Split:
    """`list_sha256`: of names and labels; `content_sha256`: of the files' bytes in that order, if asked for."""

    images: int
    classes: int
    list_sha256: str
    content_sha256: str | None = None
    broken: list[str] = field(default_factory=list)  # `file: why`, of images that cannot be read


@dataclass(frozen=True)
class Found:
    """One dataset. `problem`: why its lists cannot be read; `remarks`: what differs from the published one."""

    benchmark: str
    dataset: str
    folder: str
    splits: dict[str, Split] = field(default_factory=dict)
    problem: str | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return self.problem is None and not any(split.broken for split in self.splits.values())


@dataclass(frozen=True)
class Missing:
    benchmark: str
    dataset: str
    how: str  # to obtain it


def look(root: Path, quick: bool, contents: bool) -> tuple[list[Found], list[Missing]]:
    """Every dataset of the benchmarks under `root`. UserError where there is none.

    `quick` opens only the images' headers; `contents` hashes their bytes.
    """
    found: list[Found] = []
    missing: list[Missing] = []
    for section in _sections(root):
        try:
            folder = section.folder()
        except ConfigError:
            missing.append(Missing(section.name, section.dataset, _how(section)))
            continue
        found.append(_inspect(section, folder, quick, contents))
    if not found:
        raise UserError(f"{root}: holds no dataset of VTAB-1k or FGVC; {_layouts()}")
    return found, [gap for gap in missing if gap.benchmark in {f.benchmark for f in found}]


def _sections(root: Path) -> Iterator[BenchmarkSection]:
    """One for each dataset that the root may hold; the root may be a dataset's own folder."""
    for name in BENCHMARKS:
        kind = Plugin("data").find(name)
        assert issubclass(kind, BenchmarkSection)
        own = (root / kind.marker).is_file()
        for dataset in kind.classes:
            spellings = kind.spellings.get(dataset, (dataset,))
            if not own or root.resolve().name in spellings:
                section = check({"name": name, "root": str(root), "dataset": dataset}, kind)
                yield section


def _inspect(section: BenchmarkSection, folder: Path, quick: bool, contents: bool) -> Found:
    what = section.name, section.dataset, str(folder)
    try:
        whole, parts = section.load(False), {}
    except UserError as error:
        return Found(*what, problem=str(error))
    published = _published(section)
    remarks = []
    for split, images in (("train", whole.train), ("val", whole.val), ("test", whole.test)):
        parts[split] = _split(images, quick, contents)
    if any(parts[split].images != count for split, count in published.items()):
        counts = ", ".join(f"{split} {count:,}" for split, count in published.items())
        remarks.append(f"the published one has {counts} images")
    if parts["train"].classes < len(whole.classes):
        remarks.append(f"train shows {parts['train'].classes} of {len(whole.classes)} classes")
    if section.name == "vtab":
        remarks += _whole_of_1000(section)
    return Found(*what, parts, remarks=remarks)


def _whole_of_1000(section: BenchmarkSection) -> list[str]:
    """Whether train800val200 is the two together."""
    try:
        held, whole = section.load(False), section.load(True)
    except UserError as error:
        return [str(error)]
    parts = [(s.name(i), s.labels[i]) for s in (held.train, held.val) for i in range(len(s))]
    both = [(whole.train.name(i), whole.train.labels[i]) for i in range(len(whole.train))]
    return [] if sorted(parts) == sorted(both) else ["train800val200 is not train800 and val200 together"]


def _split(images: Images, quick: bool, contents: bool) -> Split:
    assert isinstance(images, Files)
    files = [images.file(i) for i in range(len(images))]
    with ThreadPoolExecutor() as pool:  # PIL decodes without Python's lock
        broken = [problem for problem in pool.map(_header if quick else _decoded, files) if problem]
    listed = hashlib.sha256()
    for i, label in enumerate(images.labels):
        listed.update(f"{images.name(i)}\t{label}\n".encode())
    return Split(
        len(images), len(set(images.labels)), listed.hexdigest(), _content(files) if contents else None, broken
    )


def _decoded(file: Path) -> str | None:
    try:
        read(file)
    except UserError as error:
        return str(error).partition("; snell data check")[0]
    return None


def _header(file: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(file):
            return None
    except Exception:  # say it in the reader's words
        return _decoded(file)


def _content(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        try:
            found.update(hashlib.sha256(file.read_bytes()).digest())
        except OSError:
            found.update(b"missing")
    return found.hexdigest()


def _published(section: BenchmarkSection) -> dict[str, int]:
    if section.name == "vtab":
        return {"train": 800, "val": 200, "test": vtab.DATASETS[section.dataset][1]}
    _, train, val, test = fgvc.DATASETS[section.dataset]
    return {"train": train, "val": val, "test": test}


def _how(section: BenchmarkSection) -> str:
    if section.name == "vtab":
        return vtab.HOW
    return f"{fgvc.HOW[section.dataset]}; with {fgvc.SPLIT_FILES}"


def _layouts() -> str:
    return "expected are DIR/<dataset> with train800.txt, val200.txt, test.txt, or with train.json, val.json, test.json"


def report(found: list[Found], missing: list[Missing]) -> str:
    """For people: a line a dataset, then what is wrong, then what is missing."""
    lines = []
    width = max(len(f.dataset) for f in found)
    for f in found:
        state = "sound" if f.sound else "BROKEN"
        counts = "  ".join(
            f"{name} {s.images:,} of {s.classes} classes {s.list_sha256[:12]}" for name, s in f.splits.items()
        )
        lines.append(f"{f.benchmark}  {f.dataset:{width}}  {state:6}  {counts or f.problem}")
        lines += [f"    {remark}" for remark in f.remarks]
        for name, split in f.splits.items():
            lines += [f"    {name}: {problem}" for problem in split.broken[:SHOWN]]
            if len(split.broken) > SHOWN:
                lines.append(f"    {name}: and {len(split.broken) - SHOWN} more images that cannot be read")
    for benchmark in dict.fromkeys(gap.benchmark for gap in missing):
        gaps = [gap for gap in missing if gap.benchmark == benchmark]
        for how in dict.fromkeys(gap.how for gap in gaps):
            names = ", ".join(gap.dataset for gap in gaps if gap.how == how)
            lines.append(f"{benchmark}  missing: {names}\n    to be had as {how}")
    return "\n".join(lines)
