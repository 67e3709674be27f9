"""Files of tensors, told apart by their bytes: safetensors, npz, torch's zip and its older pickle.

Nothing in a file is executed: arrays are read without pickle, pickles by torch's reader of plain data.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from snell_dist.config import first_line, nearest

# What a folder may hold, what is safest to read first.
NAMES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HUB = re.compile(r"hub:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>\S+))?")


class Unreadable(Exception):
    """Why a source cannot be read, in one line."""


class Absent(Unreadable):
    """The hub has no file of this name."""


def on_hub(source: str) -> bool:
    return source.startswith("hub:")


def load(source: str) -> Any:
    """What the source holds: a dictionary of tensors, or a tree with one somewhere in it."""
    if on_hub(source):
        return _load_hub(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise Unreadable(f"no such file or folder{_nearest_file(path)}")
    try:
        return _load_any(path, lambda name: path.parent / name)
    except OSError as error:
        raise Unreadable(f"{path.name} cannot be read: {error.strerror or error}") from None


def _nearest_file(path: Path) -> str:
    if path.parent.is_dir() and (near := nearest(path.name, (p.name for p in path.parent.iterdir()))):
        return near
    plain_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))
    return f"; for one on the Hugging Face hub say hub:{path}" if plain_name else ""


def _load_folder(folder: Path) -> Any:
    path = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if path is None:
        raise Unreadable(f"the folder has none of {', '.join(NAMES)}; name the file itself")
    return load(str(path))


def _load_hub(source: str) -> Any:
    """The first of NAMES that the repository has, downloaded or from the cache."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    found = HUB.fullmatch(source)
    if found is None:
        raise Unreadable("must be hub:ORG/NAME or hub:ORG/NAME@REVISION")

    def fetch(name: str) -> Path:
        try:
            return Path(huggingface_hub.hf_hub_download(found["repo"], name, revision=found["revision"]))
        except EntryNotFoundError as error:
            raise Absent(first_line(error)) from None
        except Exception as error:  # the hub's other errors have no common class
            raise Unreadable(f"the hub does not give {name}: {first_line(error)}") from None

    reasons = []
    for name in NAMES:
        try:
            path = fetch(name)
        except Absent as error:
            reasons.append(str(error))
        else:
            return _load_any(path, fetch)
    raise Unreadable(f"the hub gives none of {', '.join(NAMES)}: {reasons[0]}")


def _load_any(path: Path, sibling: Callable[[str], Path]) -> Any:
    """A file, or an index of files that `sibling` finds."""
    with path.open("rb") as stream:
        is_json = stream.read(16).lstrip().startswith(b"{")
    return _load_index(path, sibling) if is_json else _load_file(path)


def _load_index(path: Path, sibling: Callable[[str], Path]) -> dict[str, Tensor]:
    """Every file that the index names, as one."""
    try:
        names = {str(name) for name in json.loads(path.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Unreadable(f"{path.name} is text that is no index of files with weights") from None
    state: dict[str, Tensor] = {}
    for name in sorted(names):
        shard = sibling(Path(name).name)  # a name only: an index names files beside it
        if not shard.is_file():
            raise Unreadable(f"{path.name} names {shard.name}, which is not there")
        part = _load_file(shard)
        if not isinstance(part, dict):
            raise Unreadable(f"{shard.name} has no tensors by name")
        state |= part
    return state


def _load_file(path: Path) -> Any:
    with path.open("rb") as stream:
        start = stream.read(512)
    if not start:
        raise Unreadable(f"{path.name} is empty")
    if start[8:9] == b"{":
        return _load_safetensors(path)
    if start.startswith(b"PK"):
        return _load_zip(path)
    if start.startswith(b"\x80"):
        return _load_torch(path)
    if start.startswith(b"version https://git-lfs"):
        raise Unreadable(f"{path.name} is a git-lfs pointer and not the file itself: run git lfs pull")
    kind = "text" if start.isascii() and start.decode("ascii").replace("\n", "").isprintable() else "no checkpoint"
    raise Unreadable(f"{path.name} is {kind} (allowed: safetensors, npz, torch)")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise Unreadable(f"{path.name} is cut off or damaged: {first_line(error)}") from None


def _load_zip(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        raise Unreadable(f"{path.name} is cut off or damaged: a zip archive without a sound end") from None
    if any(name.endswith(".npy") for name in names):
        return _load_npz(path)
    if any(name.endswith("/constants.pkl") for name in names):
        raise Unreadable(
            f"{path.name} is a TorchScript program, which is never run; where you trust it,"
            " torch.save(torch.jit.load(file).state_dict(), new) writes its weights"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise Unreadable(f"{path.name} is a zip archive of other things: unpack it and name the checkpoint in it")
    return _load_torch(path, mmap=True)


def _load_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _tensor(arrays[name]) for name in arrays.files}
    except OSError:
        raise
    except Exception as error:  # numpy's readers have no common class of errors
        raise Unreadable(f"{path.name} is damaged or holds more than plain arrays: {first_line(error)}") from None


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype == np.dtype("V2"):  # how numpy writes the bfloat16 that it does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _load_torch(path: Path, mmap: bool = False) -> Any:
    mmap = mmap and path.suffix != ".safetensors"  # torch maps only what it opens itself, and believes that name
    try:
        # Training scripts save their options beside the weights: plain data.
        allowed = torch.serialization.safe_globals([argparse.Namespace])
        with path.open("rb") as stream, allowed, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocol, before an error that says more
            return torch.load(path if mmap else stream, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # torch's reader has no common class of errors
        code = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class) ([\w.]+)", str(error))
        if code is None:
            raise Unreadable(f"{path.name} is cut off, damaged, or a pickle that torch did not write") from None
        raise Unreadable(
            f"{path.name} asks to run {code[1] or code[2]}, and code in a checkpoint is never run; where you trust it,"
            " load it yourself and save its state_dict as safetensors"
        ) from None
