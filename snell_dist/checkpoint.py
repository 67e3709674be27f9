"""Training checkpoints: one format for every engine and any number of ranks, written by torch.distributed.checkpoint.

RUN/checkpoints/
    step_00000200/       the state after 200 steps; appears by one rename, so it is whole or absent
        __0_0.distcp ... .metadata    tensors, keyed `model/<name>`, `optimizer/<name>/<state>`, `ema/<name>`
        meta.json        the rest: step, place in the data, engine, base, method; sizes and hashes of the files
    latest               the name of the newest, moved last

Randomness and learning rate are functions of (seed, step, rank) and of the step, and the order of the data of
(seed, step), so none of them is state; meta.json says where they stood, for people.
"""

from __future__ import annotations

import io
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import torch
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from snell_dist import dist, log
from snell_dist.config import MachineError, UserError
from snell_dist.files import sha256, sync, write_atomic

FORMAT: Final = "snell_dist checkpoint 2"
FOLDER, LATEST, META = "checkpoints", "latest", "meta.json"
NAME = re.compile(r"step_(\d{8})")
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class Meta(BaseModel):
    """What meta.json says. `files`: bytes and SHA-256 of each; `without_state`: trains, and has no optimizer state."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["snell_dist checkpoint 2"] = FORMAT
    step: int  # done
    steps: int
    epoch: int
    batch: int  # of that epoch, the next to come
    seed: int
    lr: float  # of the last step
    engine: dict[str, Any]
    world_size: int
    base: str
    base_sha256: str
    method: dict[str, Any]
    classes: list[str]
    without_state: list[str] = []
    files: dict[str, tuple[int, str]] = {}


@dataclass(frozen=True)
class Checkpoint:
    """One that is complete. It satisfies `engines.Saved`."""

    path: Path
    meta: Meta

    @cached_property
    def _metadata(self) -> Metadata:
        return _Reader(self.path).read_metadata()

    def specs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor."""
        entries = self._metadata.state_dict_metadata
        return {
            key: (tuple(e.size), e.properties.dtype)
            for key, e in entries.items()
            if isinstance(e, TensorStorageMetadata)
        }

    def read(self, into: Mapping[str, Tensor]) -> None:
        """Fills these tensors, plain or sharded, in place; each rank reads what it needs, for itself."""
        if not into:
            return
        try:
            dcp.load(dict(into), storage_reader=_Reader(self.path), no_dist=True)
        except (Exception, CheckpointException) as error:
            raise UserError(f"{self.path}: cannot be read: {_reason(error)}") from None

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Whole tensors whose keys begin so, in host memory."""
        into = {k: torch.empty(s, dtype=dtype) for k, (s, dtype) in self.specs().items() if k.startswith(prefix)}
        self.read(into)
        return into

    def damage(self, contents: bool, share: slice = slice(None)) -> str | None:
        """What is wrong with its files, or with a share of them; `contents`: their hashes as well as their sizes."""
        for name, (size, digest) in list(self.meta.files.items())[share]:
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes of {size}"
            if contents and sha256(file) != digest:
                return f"{name} has other contents than were written"
        return None

    def check(self, base_sha256: str, method: Mapping[str, Any]) -> None:
        """UserError where it is of another base, or of a method with other settings."""
        if self.meta.base_sha256 != base_sha256:
            theirs = f"{self.meta.base} with weights {self.meta.base_sha256[:12]}"
            raise UserError(f"{self.path}: belongs to {theirs}, and the weights here are {base_sha256[:12]}")
        different = [k for k in {**self.meta.method, **method} if self.meta.method.get(k) != method.get(k)]
        if different:
            k = different[0]
            said = f"method.{k} = {method.get(k)!r} here and {self.meta.method.get(k)!r} there"
            raise UserError(f"{self.path}: was made with another method: {said}")


def finished(folder: Path) -> list[Checkpoint]:
    """The complete ones of a run folder, oldest first; what cannot be read is left out with a warning."""
    found = []
    places = (folder / FOLDER).glob("step_*") if (folder / FOLDER).is_dir() else ()
    for path in sorted(p for p in places if NAME.fullmatch(p.name)):
        try:
            one = opened(path)
            problem = one.damage(contents=False)
        except UserError as error:
            problem = str(error)
        if problem:
            log.warn(f"checkpoint {path} is damaged and left alone: {problem}")
        else:
            found.append(one)
    return found


def opened(path: Path) -> Checkpoint:
    """UserError where it is none, or not complete."""
    try:
        return Checkpoint(path, Meta.model_validate_json((path / META).read_bytes()))
    except FileNotFoundError:
        raise UserError(f"{path}: is no training checkpoint (it has no {META})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path / META}: is not of this version ({where}: {first['msg'].lower()})") from None
    except OSError as error:
        raise UserError(f"{path / META}: {error.strerror}") from None


def newest(folder: Path) -> Checkpoint | None:
    """The newest that is whole, the same on every rank; they share the reading of its files."""
    paths = dist.first_does(lambda: [one.path for one in finished(folder)])
    for path in reversed(paths):
        one = opened(path)
        share = slice(dist.rank(), None, dist.world_size())
        problems = [found for found in dist.gather_objects(one.damage(contents=True, share=share)) if found]
        if not problems:
            return one
        if dist.rank() == 0:
            log.warn(f"checkpoint {path} is damaged and left alone: {problems[0]}")
    return None


@dataclass(frozen=True)
class _Pending:
    meta: Meta
    temporary: Path
    written: Future


class Checkpoints:
    """Writes those of one run folder, and keeps the newest few. All ranks call every method.

    background: `save` copies the state and returns; the files are written while training goes on.
    """

    def __init__(self, folder: Path, keep: int, background: bool = False) -> None:
        self._folder, self._keep, self._background = folder, keep, background
        self._parent = folder / FOLDER
        self._pending: _Pending | None = None
        self._begun = 0.0
        self.last_s: float | None = None  # that the last one took, until it had its name
        self._options: dict[str, Any] = {"no_dist": True}
        if dist.world_size() > 1:  # of its own, since training uses the other one meanwhile
            self._options = {"process_group": torch.distributed.new_group(backend="gloo")}

    def save(self, state: Mapping[str, Tensor], meta: Meta) -> None:
        """MachineError, on every rank, where it cannot be written; older ones stay as they are."""
        self.settle(wait=True)
        self._begun = time.perf_counter()
        temporary = dist.first_does(lambda: self._begin(meta.step))
        writer = FileSystemWriter(temporary, sync_files=True)
        if self._background:
            written = dcp.async_save(dict(state), storage_writer=writer, **self._options)
            assert isinstance(written, Future)
            self._pending = _Pending(meta, temporary, written)
        else:
            self._publish(meta, temporary, lambda: dcp.save(dict(state), storage_writer=writer, **self._options))

    def settle(self, wait: bool = False) -> None:
        """Gives a checkpoint that was written in the background its name; `wait`: for the end of the writing."""
        if self._pending is None:
            return
        done = self._pending.written.done()
        if wait or dist.all_agree(done):
            pending, self._pending = self._pending, None
            self._publish(pending.meta, pending.temporary, pending.written.result)

    def _begin(self, step: int) -> Path:
        self._parent.mkdir(parents=True, exist_ok=True)
        for old in self._parent.glob(".tmp_*"):
            shutil.rmtree(old)
        temporary = self._parent / f".tmp_step_{step:08d}"
        temporary.mkdir()
        return temporary

    def _publish(self, meta: Meta, temporary: Path, write: Callable[[], Metadata]) -> None:
        try:
            metadata = write()
            files = {f.name: (f.stat().st_size, sha256(f)) for f in temporary.glob(f"__{dist.rank()}_*")}
            problem = None
        except (Exception, CheckpointException) as error:  # the latter is none of the former
            metadata, files, problem = None, {}, _reason(error)
        everyone = dist.gather_objects((files, problem))
        problems = [p for _, p in everyone if p]

        def finish() -> None:
            if problems:
                shutil.rmtree(temporary, ignore_errors=True)
                kept = [c.path.name for c in finished(self._folder)]
                stays = f"{kept[-1]} stays whole" if kept else "there is none before it"
                free = f"{shutil.disk_usage(self._parent).free / 2**20:,.0f} MiB are free there"
                raise MachineError(f"{self._parent}: cannot save step {meta.step}: {problems[0]} ({free}); {stays}")
            assert metadata is not None
            self._complete(meta, temporary, metadata, {k: v for f, _ in everyone for k, v in f.items()})

        dist.first_does(finish)
        self.last_s = time.perf_counter() - self._begun

    def _complete(self, meta: Meta, temporary: Path, metadata: Metadata, files: dict[str, tuple[int, str]]) -> None:
        keys = metadata.state_dict_metadata
        stateful = {k.split("/")[1] for k in keys if k.startswith("optimizer/")}
        without = [k.removeprefix("model/") for k in keys if k.startswith("model/") and k.split("/")[1] not in stateful]
        said = temporary / ".metadata"
        files |= {said.name: (said.stat().st_size, sha256(said))}
        whole = meta.model_copy(update={"without_state": sorted(without), "files": dict(sorted(files.items()))})
        write_atomic(temporary / META, whole.model_dump_json(indent=1))
        sync(temporary)
        final = self._parent / f"step_{meta.step:08d}"
        if final.exists():  # the same step, written again after a resume from before it
            _delete(final)
        temporary.replace(final)
        write_atomic(self._parent / LATEST, f"{final.name}\n")
        sync(self._parent)
        for old in finished(self._folder)[: -self._keep]:
            _delete(old.path)


def _delete(path: Path) -> None:
    """First its name, so that whoever is killed meanwhile leaves no half of a checkpoint; the next save clears up."""
    nameless = path.with_name(f".tmp_old_{path.name}")
    path.replace(nameless)
    shutil.rmtree(nameless)


class _Reader(FileSystemReader):
    """Executes nothing: the list of tensors is a pickle, of which only DCP's own records are taken."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            metadata = _Unpickler(io.BytesIO(file.read_bytes())).load()
            if not isinstance(metadata, Metadata):
                raise TypeError(f"it holds a {type(metadata).__name__}")
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from None
        except Exception as error:  # pickle's errors have no common class
            raise UserError(f"{file}: is damaged or not of torch.distributed.checkpoint ({error})") from None
        return metadata


class _Unpickler(pickle.Unpickler):
    KNOWN: ClassVar = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size",),
        "pathlib": ("PosixPath",),
        "pathlib._local": ("PosixPath",),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in self.KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}")


def _reason(error: BaseException) -> str:
    """In a few words; DCP wraps the errors of all ranks."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if "unexpected pos" in str(error):  # torch.save hides what the disk said
        return "a file was cut short"
    return str(error).partition("\n")[0] or type(error).__name__
