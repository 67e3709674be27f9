"""Published checkpoints, told apart by what they contain, never by their name, and copied into a model.

A layout is one file here, found by listing the package (names with _ are no layouts). It declares

    NAME              what people call it
    matches(state)    whether these tensors' names are of this layout
    convert(state)    the same weights under timm's or open_clip's names; tensors keep the file's sizes

Those of Transformers declare the other way, too, for one tensor after another:

    publish(name, tensor, shapes)   what becomes of a tensor of timm's or open_clip's name, with the published names;
                                    `shapes`: all of the model's, on the meta device; so may the tensor be

`native`, which is those names themselves, is tried last. `fit` then meets the model: it resizes position
embeddings and refuses what does not fit before it touches anything.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from snell_dist.config import UserError, first_line
from snell_dist.weights import _files, _unwrap
from snell_dist.weights._fit import BUFFERS, KEY, Report, fit, fitted

__all__ = ["BUFFERS", "KEY", "LAYOUTS", "Published", "Report", "fit", "fitted", "is_gone", "is_source", "read"]

_FOUND = sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
LAYOUTS: dict[str, Any] = {
    name: importlib.import_module(f"{__name__}.{name}") for name in sorted(_FOUND, key=lambda n: n == "native")
}


@dataclass(frozen=True)
class Published:
    """Tensors under timm's or open_clip's names, in the file's own sizes."""

    source: str  # as the user said it
    layout: str  # what people call it, such as MAE
    state: dict[str, Tensor]


def is_source(text: str) -> bool:
    """Whether this means a file, a folder or a place on the hub, and not a tag that a library knows."""
    return _files.on_hub(text) or "/" in text or "." in text or Path(text).exists()


def is_gone(text: str) -> bool:
    """Whether this means a file or a folder of this machine that is not there."""
    return is_source(text) and not _files.on_hub(text) and not Path(text).expanduser().exists()


def read(source: str | Path, key: str = KEY) -> Published:
    """A file, a local folder, or `hub:ORG/NAME[@REVISION]`. UserError, one line, where it cannot be read."""
    said = f"{key} = {str(source)!r}"
    try:
        state = _unwrap.tensors(_files.load(str(source)))
    except _files.Unreadable as error:
        raise UserError(f"{said}: {error}") from None
    for view in _unwrap.views(state):
        for layout in LAYOUTS.values():
            if layout.matches(view):
                return Published(str(source), layout.NAME, _converted(layout, view, said))
    known = ", ".join(layout.NAME for layout in LAYOUTS.values())
    raise UserError(f"{said}: not a layout that is known; first keys: {', '.join(list(state)[:4])} (known: {known})")


def _converted(layout: Any, state: dict[str, Tensor], said: str) -> dict[str, Tensor]:
    try:
        return layout.convert(state)
    except KeyError as error:
        raise UserError(f"{said}: lacks {error.args[0]}, which a file of layout {layout.NAME} has") from None
    except (RuntimeError, IndexError) as error:  # a tensor whose dimensions are not those of the layout
        reason = first_line(error)
        raise UserError(f"{said}: looks like {layout.NAME}, but its tensors have other shapes: {reason}") from None
