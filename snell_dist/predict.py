"""The serving check: what a finished model, ours or an exported one, says of pictures, and how often it is right."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from torch import Tensor

from snell_dist import dist, formats, log, meeting
from snell_dist.config import ConfigError, Loaded, Problem, UserError
from snell_dist.data import Batch, Images, _files
from snell_dist.evaluate import measure
from snell_dist.formats import Served
from snell_dist.run_config import Run

if TYPE_CHECKING:
    from PIL import Image

    Picture: TypeAlias = Image.Image | str | Path  # a picture, or its file

MAGIC = "*?["


@dataclass(frozen=True)
class Guess:
    """A class, and its probability by the softmax over all of the model's classes."""

    name: str
    probability: float


@dataclass(frozen=True)
class Predictor:
    """A finished model that says what is on a picture; `snell_dist.load` makes one.

    >>> model = snell_dist.load("runs/demo/001")
    >>> model.predict("nine.png", top=1)
    [Guess(name='nine', probability=0.93)]
    """

    served: Served
    device: torch.device

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of the model's logits."""
        return self.served.classes

    @overload  # a name is a sequence of characters, too, and yet one picture
    def predict(self, pictures: Picture, top: int = 5) -> list[Guess]: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, pictures: Sequence[Picture], top: int = 5) -> list[list[Guess]]: ...

    def predict(self, pictures: Picture | Sequence[Picture], top: int = 5) -> list[Guess] | list[list[Guess]]:
        """The `top` likeliest classes of a picture, likeliest first; of several pictures, one such list each.

        A picture is one of PIL's or the name of its file, of any size. All are looked at in one batch.
        UserError where a file is no whole picture, or where the model says nothing finite.
        """
        alone = not isinstance(pictures, Sequence) or isinstance(pictures, str)
        several: Any = [pictures] if alone else pictures
        if not several:
            return []
        found = self.guess([self.prepare(picture) for picture in several], top)
        for picture, guesses in zip(several, found, strict=True):
            if not guesses:
                raise UserError(f"{picture}: {NOTHING}")
        return found[0] if alone else found

    def prepare(self, picture: Picture) -> Tensor:
        """What the model takes [C, H, W]. UserError where a file is no whole picture."""
        opened = _files.read(Path(picture), advice="") if isinstance(picture, str | Path) else picture
        return self.served.prepare(opened)

    @torch.inference_mode()
    def guess(self, images: Sequence[Tensor], top: int) -> list[list[Guess]]:
        """The `top` likeliest classes of each prepared image [C, H, W]; none where the model says nothing finite."""
        logits = self.served.logits(torch.stack(list(images)).to(self.device)).float().cpu()
        probabilities, classes = logits.softmax(1).topk(min(top, len(self.classes)))
        return [
            [Guess(self.classes[c], p) for c, p in zip(best.tolist(), row.tolist(), strict=True)]
            if bool(row.isfinite().all())
            else []
            for best, row in zip(classes, probabilities, strict=True)
        ]


NOTHING = "the model says nothing finite: have its weights diverged?"


def load(path: str | Path, device: Literal["auto", "cpu", "cuda", "mps"] = "auto") -> Predictor:
    """A run folder, or a folder that `snell export` wrote, ready to predict on the best device there is.

    UserError where it is neither, or damaged; ConfigError where this machine has no such device.
    """
    chosen = _device(device)
    served = formats.serve(Path(path))
    return Predictor(served, served.to(chosen))


def _device(name: str) -> torch.device:
    try:
        return dist.pick_device(name)
    except ConfigError as error:
        raise ConfigError(*(Problem("device", p.message, p.value) for p in error.problems)) from None


def find(words: Iterable[str]) -> list[Path]:
    """The files that are named: files, all pictures in folders and below, and globs (** too). As said, each once;
    sorted within a folder or a glob. UserError, all problems at once, where a word names nothing.
    """
    found: dict[Path, None] = {}
    problems = []
    for word in words:
        here = _named(word)
        if not here:
            exists = Path(word).is_dir()
            what = "has no picture" if exists else "matches no file" if set(MAGIC) & set(word) else "no such file"
            problems.append(f"{word}: {what}")
        found |= dict.fromkeys(here)
    if problems:
        raise UserError("\n".join(problems))
    return list(found)


def _named(word: str) -> list[Path]:
    path = Path(word)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and _looks_like_a_picture(file))
    if path.exists() or not set(MAGIC) & set(word):
        return [path] if path.exists() else []
    return sorted(file for match in glob.glob(word, recursive=True) if (file := Path(match)).is_file())


def _looks_like_a_picture(file: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS  # as data.name = image_folder has it

    return file.suffix.lower() in IMG_EXTENSIONS and not file.name.startswith(".")


def rows(model: Predictor, files: Sequence[Path], top: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """What `snell predict` prints of each file, in order; a file that is no whole picture has an `error` instead."""
    left = iter(files)
    while batch := list(itertools.islice(left, batch_size)):
        errors: dict[Path, str] = {}
        images: dict[Path, Tensor] = {}
        for file in batch:
            try:
                images[file] = model.prepare(file)
            except UserError as error:
                errors[file] = str(error).removeprefix(f"{file}: ")
        guesses = dict(zip(images, model.guess(list(images.values()), top) if images else [], strict=True))
        for file in batch:
            if not guesses.get(file):
                yield {"file": str(file), "error": errors.get(file, NOTHING)}
            else:
                said = [{"class": guess.name, "probability": round(guess.probability, 6)} for guess in guesses[file]]
                yield {"file": str(file), "predictions": said}


@dataclass(frozen=True)
class _Prepared:
    """A split's pictures as a model's own library prepares them; see `Images` for the contract."""

    images: Images
    served: Served

    augments = False

    @property
    def labels(self) -> Sequence[int]:
        return self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.served.prepare(self.picture(index)), self.labels[index]

    def picture(self, index: int) -> Image.Image:
        return self.images.picture(index)

    def name(self, index: int) -> str:
        return self.images.name(index)

    def file(self, index: int) -> Path | None:
        return self.images.file(index)


def accuracy(path: Path, source: Loaded[Run], split: Literal["val", "test"]) -> dict[str, float]:
    """What `evaluate.Measured` says of a model in any folder on the data of a configuration; the pictures are prepared
    as the model's own library does it. UserError where the two know other classes.
    """
    config = source.config
    device = dist.pick_device(config.train.device)
    with meeting.process_group(device):
        splits = config.data.load(config.protocol.all_labelled)
        served = formats.serve(path)
        columns = _columns(served.classes, splits.classes, path, source.name)
        images, where = _Prepared(getattr(splits, split), served), served.to(device)

        def logits(batch: Batch) -> Tensor:
            return served.logits(batch.images.to(where)).to(device)[:, columns]

        log.info(f"{served.about}: {len(images)} images of {source.name}, {split}")
        return measure(logits, images, len(columns), config.data, device).metrics


def _columns(mine: Sequence[str], asked: Sequence[str], path: Path, name: str) -> list[int]:
    """Where the model has each class of the data, by name. UserError where they are not the same classes."""
    if list(mine) == list(asked):
        return list(range(len(asked)))
    if len(mine) != len(asked):
        raise UserError(f"{path}: knows {len(mine)} classes, and the data of {name} has {len(asked)}")
    place = {word: i for i, word in enumerate(mine)}
    foreign = [word for word in asked if word not in place]
    if foreign or len(place) < len(mine):
        said = ", ".join(foreign[:3]) or "one name for two of them"
        raise UserError(f"{path}: knows other classes than the data of {name}, which has {said}")
    return [place[word] for word in asked]
