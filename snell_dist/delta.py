"""Sparse deltas: many tasks on one resident base, swapped in place and taken off again without a trace.

    W = W0 + delta        delta [out, in]: most entries are zero; for each of the others a position and a value

A file holds the values, and their positions as whichever is smaller: int32 indices (4 bytes an entry), or a bitmap
(1 bit for each entry of the weight), which wins where more than 1 entry in 32 is there. What else was trained, such
as the classifier, is whole. Names are those of the base's own library, so a plain model of timm or open_clip takes it.

    with snell_dist.apply_delta(model, "birds/delta.safetensors"):
        model(images)
    # here the base has its own bits again
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from snell_dist.anatomy import fingerprint_of
from snell_dist.config import UserError, first_line, nearest
from snell_dist.tensor_files import read_metadata, read_tensors, write_tensors

if TYPE_CHECKING:
    from typing_extensions import Self

DELTA = "delta.safetensors"
FORMAT = "snell_dist delta 1"
VALUES, POSITIONS = ":values", ":positions"
INDEX_BYTES = 4
LARGEST = 2**31 - 1  # of an index


@dataclass(frozen=True)
class Entries:
    """The entries of a weight that are not zero: positions [n] int32 in the flattened weight, ascending; values [n]."""

    shape: tuple[int, ...]
    positions: Tensor
    values: Tensor

    @classmethod
    def of(cls, dense: Tensor) -> Entries:
        """Those of a delta that is stored whole."""
        assert dense.numel() <= LARGEST
        flat = dense.detach().flatten()
        positions = flat.nonzero().squeeze(1)
        return cls(tuple(dense.shape), positions.int(), flat[positions])

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def as_bitmap(self) -> bool:
        """Whether a bitmap is smaller than indices."""
        return -(-self.numel // 8) < INDEX_BYTES * len(self.values)

    @property
    def nbytes(self) -> int:
        """In a file of float32 values."""
        return self.values.nbytes + min(-(-self.numel // 8), INDEX_BYTES * len(self.values))

    def packed(self) -> Tensor:
        """The positions as a file has them: int32 [n], or a bitmap uint8 [numel / 8], lowest bit first."""
        if not self.as_bitmap:
            return self.positions
        there = np.zeros(self.numel, dtype=bool)
        there[self.positions.numpy()] = True
        return torch.from_numpy(np.packbits(there, bitorder="little"))

    def to(self, device: torch.device) -> Entries:
        return Entries(self.shape, self.positions.to(device), self.values.to(device))


@dataclass(frozen=True)
class Delta:
    """All that a task changes of its base, by the names of the base's own library.

    `head`: names of the base's classifier, which are no part of its fingerprint `base_sha256` (`anatomy.fingerprint`).
    `renamed`: where the fingerprint knows a tensor of the library by another name.
    """

    entries: Mapping[str, Entries]
    whole: Mapping[str, Tensor]
    base: str
    base_sha256: str
    head: tuple[str, ...]
    method: Mapping[str, Any]
    classes: list[str]
    renamed: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)  # what else a reader wants to know, such as preprocessing

    @property
    def count(self) -> int:
        """Entries that are not zero, of all weights."""
        return sum(len(entries.values) for entries in self.entries.values())

    def to(self, device: torch.device) -> Delta:
        moved = {name: entries.to(device) for name, entries in self.entries.items()}
        whole = {name: tensor.to(device) for name, tensor in self.whole.items()}
        return Delta(
            moved, whole, self.base, self.base_sha256, self.head, self.method, self.classes, self.renamed, self.about
        )


def write(file: Path, delta: Delta, dtype: torch.dtype = torch.float32) -> None:
    """The file of a delta, whole or absent; in half precision W0 + delta is no longer the merged weight to the bit."""
    tensors = {name: tensor.to(dtype) for name, tensor in delta.whole.items()}
    for name, entries in delta.entries.items():
        tensors[name + VALUES] = entries.values.to(dtype)
        tensors[name + POSITIONS] = entries.packed()
    said = {
        "shapes": {name: entries.shape for name, entries in delta.entries.items()},
        "head": delta.head, "method": delta.method, "classes": delta.classes, "renamed": delta.renamed,
        "about": delta.about,
    }  # fmt: skip
    metadata = {"format": FORMAT, "base": delta.base, "base_sha256": delta.base_sha256}
    metadata |= {key: json.dumps(value, separators=(",", ":")) for key, value in said.items()}
    write_tensors(file, tensors, metadata)


def read(file: Path) -> Delta:
    """UserError where the file is missing, damaged, or no delta."""
    tensors, metadata = read_tensors(file), read_metadata(file)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file}: not a delta file of this version (format {metadata.get('format')!r}, not {FORMAT!r})")
    try:
        said = {key: json.loads(metadata[key]) for key in ("shapes", "head", "method", "classes", "renamed", "about")}
        base, base_sha256 = metadata["base"], metadata["base_sha256"]
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: damaged: what it says of itself cannot be read ({first_line(error)})") from None
    entries = {}
    for name, shape in said["shapes"].items():
        if not {name + VALUES, name + POSITIONS} <= tensors.keys():
            raise UserError(f"{file}: damaged: lacks the values or positions of {name}")
        values, packed = tensors.pop(name + VALUES).float(), tensors.pop(name + POSITIONS)
        entries[name] = Entries(tuple(shape), _positions(packed), values)
        if not _sound(entries[name]):
            raise UserError(f"{file}: damaged: the positions of {name} do not fit its shape {shape} and its values")
    whole = {name: tensor.float() for name, tensor in tensors.items()}
    return Delta(
        entries, whole, base, base_sha256, tuple(said["head"]), said["method"], said["classes"],
        said["renamed"], said["about"],
    )  # fmt: skip


def _positions(packed: Tensor) -> Tensor:
    if packed.dtype != torch.uint8:
        return packed
    return torch.from_numpy(np.flatnonzero(np.unpackbits(packed.numpy(), bitorder="little")).astype(np.int32))


def _sound(entries: Entries) -> bool:
    """Whether every position is in the weight, once, and has its value: a file may come from anywhere."""
    positions, values = entries.positions, entries.values
    if positions.dtype != torch.int32 or positions.shape != values.shape or positions.dim() != 1:
        return False
    if not len(positions):
        return True
    ascending = bool((positions[1:] > positions[:-1]).all())
    return ascending and int(positions[0]) >= 0 and int(positions[-1]) < entries.numel <= LARGEST


def apply_delta(model: nn.Module, delta: Delta | str | Path, *, replace_head: bool = False) -> Applied:
    """Adds a task's delta to a plain model that holds its base, in place, until `remove` or the end of a `with`.

    delta: what `delta.read` gives, its file, or the folder that `snell export --format delta` wrote.
    replace_head: a classifier of another number of classes gives way to the delta's own meanwhile.
    UserError, and the model as it was, where it is another base, has a delta already, or has another classifier.
    """
    return Applied(model, _checked(model, delta, replace_head, {}))


class Applied:
    """A delta on a model. At the end of a `with`, or after `remove`, every bit is the base's again."""

    def __init__(self, model: nn.Module, delta: Delta) -> None:
        self.classes = delta.classes
        self._model = model
        self._undo: list[Undo] | None = _put(model, delta)
        _CARRIERS.add(model)

    def remove(self) -> None:
        """Gives the base its own bits back; the second time nothing happens."""
        if self._undo is not None:
            _take_back(self._undo)
            self._undo = None
            _CARRIERS.discard(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


class Resident:
    """One base that stays in memory, and many tasks' deltas beside it, one of which is in use.

    >>> model = Resident(timm.create_model("vit_base_patch16_224.augreg_in21k", pretrained=True))
    >>> model.add("birds", "birds/delta.safetensors")
    >>> model.use("birds")(images)

    Each task brings its classifier. Beside the base a task costs 8 bytes for each entry that is not zero, and
    the one in use 4 more: the base's own, which come back when the next one is used.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tasks: dict[str, Delta] = {}
        self._known: dict[Any, str] = {}
        self._in_use: str | None = None
        self._applied: Applied | None = None

    @property
    def tasks(self) -> list[str]:
        """Their names, in the order in which they were added."""
        return list(self._tasks)

    @property
    def in_use(self) -> str | None:
        """The name of the task in use; None for the bare base."""
        return self._in_use

    @property
    def classes(self) -> list[str]:
        """Of the task in use; empty for the bare base."""
        return [] if self._in_use is None else self._tasks[self._in_use].classes

    def add(self, name: str, delta: Delta | str | Path) -> None:
        """Keeps a delta beside the base, where the model is. UserError as `apply_delta`."""
        if name in self._tasks:
            raise UserError(f"Resident: there is a task {name!r} already; drop it first, or choose another name")
        before = self._in_use
        self.use(None)
        try:
            checked = _checked(self.model, delta, True, self._known)
            self._tasks[name] = checked.to(next(self.model.parameters()).device)
        finally:
            self.use(before)

    def drop(self, name: str) -> None:
        """Forgets a task."""
        self._find(name)
        if self._in_use == name:
            self.use(None)
        del self._tasks[name]

    def use(self, name: str | None) -> nn.Module:
        """The model, with this task's delta in place of another's; None: with the base's own bits."""
        delta = None if name is None else self._find(name)
        if name != self._in_use:
            if self._applied:
                self._applied.remove()
            self._applied = self._in_use = None
            if delta:
                self._applied, self._in_use = Applied(self.model, delta), name
        return self.model

    def _find(self, name: str) -> Delta:
        if name not in self._tasks:
            known = ", ".join(self._tasks) or "none"
            raise UserError(f"Resident: no task {name!r}{nearest(name, self._tasks)} (there are: {known})")
        return self._tasks[name]


_CARRIERS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _checked(model: nn.Module, given: Delta | str | Path, replace_head: bool, known: dict[Any, str]) -> Delta:
    """The delta, if it can go onto the model. `known`: the base's fingerprints so far."""
    if model in _CARRIERS:
        raise UserError("apply_delta: this model carries a delta already: remove that first, or swap with Resident")
    delta = given if isinstance(given, Delta) else read(_file(Path(given)))
    key = delta.head, tuple(delta.renamed.items())
    if key not in known:
        state = ((delta.renamed.get(name, name), tensor) for name, tensor in model.state_dict().items())
        known[key] = fingerprint_of(state, delta.head)
    if known[key] != delta.base_sha256:
        other = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()} - {"float32"})
        found = f"holds {', '.join(other)}" if other else f"has weights {known[key][:12]}"
        wanted = f"{delta.base} with weights {delta.base_sha256[:12]} in float32"
        raise UserError(f"apply_delta: the delta is for {wanted}, and this model {found}")
    own = model.state_dict()
    for name, entries in delta.entries.items():
        if name not in own or own[name].shape != entries.shape:
            raise UserError(
                f"apply_delta: this model has no {name} of shape {list(entries.shape)}: is the file damaged?"
            )
    _check_head(model, delta, replace_head)
    return delta


def _file(said: Path) -> Path:
    return said / DELTA if said.is_dir() else said


def _check_head(model: nn.Module, delta: Delta, replace: bool) -> None:
    """UserError where the model's classifier cannot take the delta's numbers, nor give way to it."""
    own = model.state_dict()
    for name in sorted(_misfits(own, delta), key=lambda name: -delta.whole[name].dim()):  # a matrix says it best
        if not replace:
            mine = list(own[name].shape) if name in own else "not there"
            theirs = f"{list(delta.whole[name].shape)} for {len(delta.classes)} classes"
            message = f"{name} is {mine} in this model, and {theirs}: replace_head=True puts the delta's own there"
            raise UserError(f"apply_delta: {message} meanwhile")
        path = name.rpartition(".")[0]
        weight = delta.whole.get(f"{path}.weight")
        if weight is None or weight.dim() != 2 or not isinstance(_module(model, path), nn.Linear | nn.Identity):
            raise UserError(f"apply_delta: {path or name} cannot be replaced: is it another kind of classifier?")


def _misfits(own: Mapping[str, Tensor], delta: Delta) -> list[str]:
    """What is whole in the delta and has no such place in the model."""
    return [name for name, tensor in delta.whole.items() if name not in own or own[name].shape != tensor.shape]


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


Undo = Callable[[], None]


@torch.no_grad()
def _put(model: nn.Module, delta: Delta) -> list[Undo]:
    """Changes the model, and says how to change it back."""
    undo: list[Undo] = []
    own = dict(model.state_dict(keep_vars=True))
    try:
        for name, entries in delta.entries.items():
            undo.append(_add(own[name], entries))
        misfits = _misfits(own, delta)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in misfits):
            undo.append(_replace_linear(model, path, delta.whole))
        own = dict(model.state_dict(keep_vars=True)) if misfits else own
        for name, tensor in delta.whole.items():
            undo.append(_overwrite(own[name], tensor))
    except BaseException:
        _take_back(undo)
        raise
    return undo


@torch.no_grad()
def _take_back(undo: list[Undo]) -> None:
    while undo:
        undo.pop()()


def _add(weight: Tensor, entries: Entries) -> Undo:
    flat, positions = weight.detach().view(-1), entries.positions.to(weight.device)
    base = flat.index_select(0, positions)
    flat.index_copy_(0, positions.long(), base + entries.values.to(flat))  # twice as fast as flat[positions] = ...

    def undo() -> None:
        flat.index_copy_(0, positions.long(), base)

    return undo


def _overwrite(parameter: Tensor, tensor: Tensor) -> Undo:
    here = parameter.detach()
    base = here.clone()
    here.copy_(tensor)

    def undo() -> None:
        here.copy_(base)

    return undo


def _replace_linear(model: nn.Module, path: str, whole: Mapping[str, Tensor]) -> Undo:
    """A classifier of the delta's size in place of the model's; its numbers come afterwards."""
    parent, _, leaf = path.rpartition(".")
    place, old = model.get_submodule(parent), model.get_submodule(path)
    weight, like = whole[f"{path}.weight"], next(model.parameters())
    new = nn.Linear(weight.shape[1], weight.shape[0], f"{path}.bias" in whole, device=like.device, dtype=like.dtype)
    new.requires_grad_(False)
    setattr(place, leaf, new.train(old.training))
    return lambda: setattr(place, leaf, old)
