"""Formats: what other libraries open. One file a format, found by its name; a file declares

    ABOUT                      in a few words, for `snell export --help`
    check(run)                 UserError where the format cannot hold this run, saying which can
    write(run, folder, dtype)  the library's own files, and nothing else
    reload(run, folder)        what the library makes of the files, as a `Served`; on the base, where they need one
    LIBRARY                    what the hub calls the library
    usage(run)                 how that opens the folder it is run in, in a few lines of Python, for the model card

and, where the files are a whole model,

    holds(folder)              whether a folder is of this format
    load(folder)               the library's own reader of it, as a `Served`

`export` writes one and proves it: what the library makes of the files against the run itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from snell_dist import card, finished, log
from snell_dist.config import UserError, nearest
from snell_dist.files import check_new, new_folder
from snell_dist.finished import Finished

if TYPE_CHECKING:
    from PIL import Image

NAMES = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative error of the logits that a sound export may have: rounding of a whole model's forward, by dtype.
LIMITS = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}
PROVEN_ON = 4  # images


@dataclass(frozen=True)
class Served:
    """A model that says what is on a picture, whoever's file it came from.

    `model`: the module that `logits` calls, to be moved to another device; None: it stays on the CPU.
    """

    logits: Callable[[Tensor], Tensor]  # images [B, C, H, W] to [B, classes]
    prepare: Callable[[Image.Image], Tensor]  # a picture to [C, H, W]
    classes: list[str]
    image_shape: tuple[int, int, int]
    about: str
    model: nn.Module | None = None

    def to(self, device: torch.device) -> torch.device:
        """Moves the model there, if it can be moved. Returns where it is."""
        if self.model is None:
            return torch.device("cpu")
        self.model.to(device)
        return device


@dataclass(frozen=True)
class Exported:
    folder: Path
    bytes: int
    error: float | None  # relative, of the logits of the reloaded model; None where none was reloaded


def find(name: str) -> Any:
    """The format of this name. UserError with those that exist."""
    if name not in NAMES:
        raise UserError(f"--format {name}: no such format{nearest(name, NAMES)} (there are {', '.join(NAMES)})")
    return importlib.import_module(f"{__name__}.{name}")


def own(folder: Path) -> str:
    """The format of the library that a run's model is of; timm's for an image tower with a classifier."""
    return "open_clip" if _read(folder).config.task.name == "contrastive" else "timm"


def _read(folder: Path) -> Finished:
    name = None if (folder / "config.yaml").is_file() else _holding(folder)
    if name:
        raise UserError(f"{folder}: holds {name}'s files, whose weights have a delta folded in already: name a run")
    return finished.read(folder)


def _holding(folder: Path) -> str | None:
    """The format of a folder's files, where they are a whole model."""
    formats = ((name, find(name)) for name in NAMES)
    return next((name for name, format in formats if hasattr(format, "load") and format.holds(folder)), None)


def export(folder: Path, name: str, to: Path, dtype: str = "float32", proven: bool = True) -> Exported:
    """Writes a finished run into a new folder in the format, once it has proven itself.

    The proof has one whole model in memory at a time, writing one tensor.

    UserError where the run is not complete, the format cannot hold it, `to` exists, or the proof fails.
    """
    format = find(name)
    check_new(to)
    run = _read(folder)
    format.check(run)
    with new_folder(to) as place:
        format.write(run, place, DTYPES[dtype])
        error = prove(run, partial(format.reload, run, place), LIMITS[dtype]) if proven else None
        card.write(place, run, name, format.LIBRARY, format.usage(run), _proof(error, dtype))
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    return Exported(to, size, error)


def _proof(error: float | None, dtype: str) -> str:
    if error is None:
        return f"Weights in {dtype}; not compared with the run (`--unproven`)."
    return f"Weights in {dtype}; reloaded, their logits differ from the run's by {error:.1e}, relative."


def prove(run: Finished, reload: Callable[[], Served], limit: float) -> float:
    """The relative error |theirs - ours| / |ours| of logits on made-up images, one model in memory after the other.

    UserError where it exceeds `limit`.
    """
    found, ours = _tried(reload), _tried(partial(serve_run, run))
    error = ((found - ours).norm() / ours.norm()).item()
    if not error <= limit:
        raise UserError(f"{run.folder}: reloaded, its logits differ by {error:.1e}, more than {limit:.0e}; not kept")
    log.info(f"reloaded: logits differ by {error:.1e}, relative, on {PROVEN_ON} images")
    return error


@torch.no_grad()
def _tried(make: Callable[[], Served]) -> Tensor:
    """Logits, of a model that goes when they are there."""
    served = make()
    images = torch.randn(PROVEN_ON, *served.image_shape, generator=torch.Generator().manual_seed(0))
    return served.logits(images).double()


def serve(path: Path) -> Served:
    """A run folder, or a folder in any of the formats. UserError where it is neither."""
    if (path / "config.yaml").is_file():
        return serve_run(finished.read(path))
    name = _holding(path)
    if name:
        return find(name).load(path)
    whole = ", ".join(name for name in NAMES if hasattr(find(name), "load"))
    known = f"a run folder, or what snell export wrote as {whole}"
    raise UserError(f"{path}: {'is no model' if path.exists() else 'no such folder'}; expected is {known}")


def serve_run(run: Finished) -> Served:
    backbone = run.backbone()
    return Served(
        logits=run.config.task.logits(backbone, run.classes),
        prepare=run.prepare,
        classes=run.classes,
        image_shape=backbone.image_shape,
        about=f"run {run.folder}",
        model=backbone.model,
    )
