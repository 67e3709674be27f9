"""From published tensors into a model: what fits is copied, what does not is said before anything changed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snell_dist.config import UserError
from snell_dist.weights import _resize

if TYPE_CHECKING:
    from snell_dist.weights import Published

KEY = "backbone.weights"
SAID = 4  # entries of a list that a line shows
# Made by the model from its own shape.
BUFFERS = ("relative_position_index", "attn_mask", "position_ids")


@dataclass(frozen=True)
class Report:
    """What `fit` did; as text, one line."""

    source: str
    layout: str
    matched: int  # tensors
    resized: list[str]  # such as `pos_embed 14x14 to 16x16`
    ignored: list[str]  # in the file, not in the model
    missing: list[str]  # in the model, not in the file
    fraction: float  # of the backbone's elements that were filled; without the classifier

    def __str__(self) -> str:
        lists = {
            "resized": _counted(entry.rpartition(".")[2] for entry in self.resized),
            "missing": _brief(self.missing),
            "ignored": _brief(self.ignored),
        }
        said = "".join(f"; {title} {text}" for title, text in lists.items() if text)
        head = f"weights: {self.source} ({self.layout}): {self.matched} tensors"
        return f"{head}, {_percent(self.fraction)} of the backbone{said}"


def fit(
    model: nn.Module,
    published: Published,
    *,
    head: Sequence[str] = ("head",),
    keep_head: bool = False,
    least: float = 0.99,
    key: str = KEY,
) -> Report:
    """Copies into the model, in place and in its dtypes; the classifier, all below `head`, only with `keep_head`.

    Raises UserError naming `key`, with the model untouched, where a tensor has another shape, where less than
    `least` of the backbone would be filled, or where a classifier is asked for and there is none that fits.
    """
    ready, report = fitted(model, published, head=head, keep_head=keep_head, least=least, key=key)
    targets = model.state_dict()
    with torch.no_grad():
        for name, tensor in ready.items():
            targets[name].copy_(tensor)
    return report


def fitted(
    model: nn.Module,
    published: Published,
    *,
    head: Sequence[str] = ("head",),
    keep_head: bool = False,
    least: float = 0.99,
    key: str = KEY,
) -> tuple[dict[str, Tensor], Report]:
    """What `fit` copies, under the model's names and in its shapes, not copied; the model may be on the meta device."""
    said = f"{key} = {published.source!r} ({published.layout})"
    targets, state = model.state_dict(), published.state
    classifier = [name for name in targets if _below(name, head)]
    backbone = [name for name in targets if name not in classifier]
    if keep_head:
        _check_classifier({name: targets[name] for name in classifier}, state, said)

    ready: dict[str, Tensor] = {}
    resized = []
    for name in [*backbone, *classifier] if keep_head else backbone:
        if name in state:
            ready[name], note = _ready(model, name, state[name], targets[name], said)
            resized += [note] if note else []

    missing = [name for name in backbone if name not in ready]
    total = sum(targets[name].numel() for name in backbone)
    filled = sum(targets[name].numel() for name in backbone if name in ready)
    fraction = filled / total if total else 1.0
    if fraction < least:
        lacks = missing[0] + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise UserError(
            f"{said}: fills {_percent(fraction)} of the backbone, less than {100 * least:g}%; lacks {lacks}"
            f" (is it another model's file? It has {', '.join(list(state)[:2])}, ...;"
            " backbone.min_match lowers the limit)"
        )
    ignored = [name for name in state if name not in ready and name.rpartition(".")[2] not in BUFFERS]
    return ready, Report(published.source, published.layout, len(ready), resized, ignored, missing, fraction)


def _ready(model: nn.Module, name: str, tensor: Tensor, target: Tensor, said: str) -> tuple[Tensor, str]:
    """The tensor as the model takes it, and a word on its resizing."""
    if target.is_floating_point() and not tensor.is_floating_point():
        raise UserError(f"{said}: {name} is {tensor.dtype}, quantized; only plain floating point is read")
    shaped = _resize.to_model(model, name, tensor, target)
    if shaped is None:
        shapes = f"{list(tensor.shape)} for {name} {list(target.shape)}"
        raise UserError(f"{said}: has {shapes}: is it another model's file?")
    return shaped


def _below(name: str, head: Sequence[str]) -> bool:
    """Whether the name is of the classifier. timm keeps ConvNeXt's last norm there, but it was pretrained."""
    return any(name == h or (name.startswith(f"{h}.") and not name.startswith(f"{h}.norm.")) for h in head)


def _check_classifier(targets: dict[str, Tensor], state: dict[str, Tensor], said: str) -> None:
    for name, target in targets.items():
        if name not in state:
            raise UserError(f"{said}: has no classifier ({name}); backbone.head must be new")
        tensor = state[name]
        if tensor.shape[:1] != target.shape[:1]:
            counts = f"has a classifier of {len(tensor)} classes, and {len(target)} are asked for"
            raise UserError(f"{said}: {counts}; backbone.head must be new, which makes one")


def _percent(share: float) -> str:
    """Never rounded up: 100.0% is all."""
    return f"{floor(share * 1000) / 10:.1f}%"


def _brief(names: Sequence[str]) -> str:
    """A few names as they are, those of all blocks as one, and many by their first word."""
    ways = (names, [re.sub(r"\.\d+\b", ".*", name) for name in names], [name.partition(".")[0] for name in names])
    return _counted(next((way for way in ways if len(set(way)) <= SAID), ways[-1]))


def _counted(entries: Iterable[str]) -> str:
    counts = Counter(entries)
    said = [entry if count == 1 else f"{entry} ({count})" for entry, count in counts.items()]
    return ", ".join(said[:SAID]) + (f" and {len(said) - SAID} more" if len(said) > SAID else "")
