"""Training checkpoints outside of their run: listed, read through, made into adapter files; and DeepSpeed's converted.

All in one process, without a device and a launcher. But for `convert`, nothing in a checkpoint is executed.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from snell_dist import adapter, log, tensor_files, weights
from snell_dist.checkpoint import FOLDER, LATEST, META, NAME, Checkpoint, opened
from snell_dist.config import UserError, first_line, nearest
from snell_dist.files import check_new, new_folder

EXPECTED = f"expected is a run folder, which has {FOLDER}/step_<number>, or one such step"
DEEPSPEED = f"expected is what DeepSpeed's save_checkpoint wrote, which has `{LATEST}` and global_step<number>"
WEIGHTS = "model.safetensors"  # a folder with it is one that `backbone.weights` reads
PLAIN = "mp_rank_00_model_states.pt"  # of the stages that do not divide the parameters
EXTRA = "snell_dist[deepspeed]"
MIB = 2**20
PIECE = 256 * MIB  # read at once
SHOWN = 5  # names of a list
# AdamW's count, and what bitsandbytes keeps beside 8-bit moments: of sizes of their own.
COUNT, TABLES = "step", ("qmap1", "qmap2", "absmax1", "absmax2")


@dataclass(frozen=True)
class Found:
    """A checkpoint as it lies there; a damaged one does not say everything."""

    path: str
    written: str  # by the time of its last file
    bytes: int
    latest: bool  # `latest` names it
    problem: str | None  # why it is not whole, by the sizes of its files and its list of tensors
    step: int | None = None
    steps: int | None = None
    epoch: int | None = None
    engine: str | None = None
    world_size: int | None = None
    tensors: int | None = None


@dataclass(frozen=True)
class Listing:
    checkpoints: list[Found]  # oldest first
    latest: str | None  # what that file of the run says
    leftovers: list[str]  # of saves that were cut off, or that go on now


def places(path: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first, or the one that is named. UserError where there is none."""
    if not path.is_dir():
        raise UserError(f"{path}: {_no_folder(path)}; {EXPECTED}")
    path = path.resolve() if path.name in ("", "..") else path
    if NAME.fullmatch(path.name) or (path / META).is_file():
        return [path]
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    found = sorted(p for p in folder.glob("step_*") if NAME.fullmatch(p.name) and p.is_dir())
    if not found:
        raise UserError(f"{path}: has no checkpoint{_instead(path, folder)}")
    return found


def _no_folder(path: Path) -> str:
    if path.exists():
        return "is a file"
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return f"no such folder{nearest(path.name, beside)}"


def _instead(path: Path, folder: Path) -> str:
    """What a folder without checkpoints is, as far as that can be told."""
    if left := _leftovers(folder):
        return f" that is whole, only {', '.join(left)} of a save that was cut off, or goes on now"
    if (path / "config.yaml").is_file():
        return " yet; train.save_every says after how many steps a run writes one"
    if _is_step(path) or any(_is_step(p) for p in path.iterdir()):
        return " of snell_dist: it is DeepSpeed's, which snell checkpoint convert reads"
    runs = sorted({p.parent for depth in ("*", "*/*", "*/*/*") for p in path.glob(f"{depth}/{FOLDER}")})
    return f"; {EXPECTED}" + (f"; did you mean {runs[-1]}?" if runs else "")


def _leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(".tmp_") or p.name == f".{LATEST}.tmp")


def look(path: Path) -> Listing:
    """What a run has, or the one checkpoint that is named; tensors stay unread. UserError where there is none."""
    found = places(path)
    parent = found[0].parent
    latest = parent / LATEST
    said = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else None
    checkpoints = [_found(p, said) for p in found]
    if found[0].resolve() == path.resolve():
        return Listing(checkpoints, None, [])
    return Listing(checkpoints, said, _leftovers(parent))


def _found(path: Path, latest: str | None) -> Found:
    files = [p for p in path.rglob("*") if p.is_file()]
    when = datetime.fromtimestamp(max(p.stat().st_mtime for p in (files or [path]))).astimezone()
    size = sum(p.stat().st_size for p in files)
    about = str(path), when.isoformat(timespec="seconds"), size, path.name == latest
    try:
        one = opened(path)
        meta, problem = one.meta, one.damage(contents=False)
        tensors = None if problem else len(one.specs())
    except UserError as error:
        named = NAME.fullmatch(path.name)
        return Found(*about, _inside(path, error), int(named[1]) if named else None)
    # ZeRO's stages are different engines to a reader.
    engine = "-".join(str(meta.engine[key]) for key in ("name", "stage") if key in meta.engine)
    return Found(*about, problem, meta.step, meta.steps, meta.epoch, engine, meta.world_size, tensors)


def _inside(path: Path, error: UserError) -> str:
    """What is wrong, without the name of the checkpoint, which stands beside it."""
    return str(error).removeprefix(f"{path}: ").removeprefix(f"{path}/")


def listing(found: Listing) -> str:
    """For people: a line a checkpoint, then what else lies there."""
    titles = ("step", "epoch", "written", "engine", "ranks", "size", "tensors", "")
    lines = log.columns([titles, *map(_row, found.checkpoints)], right=(0, 1, 4, 5, 6))
    whole = [Path(f.path).name for f in found.checkpoints if f.problem is None]
    if found.latest and found.latest not in whole:
        there = any(f.latest for f in found.checkpoints)
        goes_on = f"a resumed run starts from {whole[-1]}" if whole else "a resumed run starts anew"
        lines.append(f"latest names {found.latest}, which is {'damaged' if there else 'not there'}; {goes_on}")
    lines += [f"{name}: of a save that was cut off, or goes on now" for name in found.leftovers]
    return "\n".join(lines)


def _row(f: Found) -> tuple[str, ...]:
    steps = f"{f.step} of {f.steps}" if f.steps is not None else _said(f.step)
    state = ("latest, " if f.latest else "") + (f"DAMAGED: {f.problem}" if f.problem else "whole")
    written = f.written[:19].replace("T", " ")
    size = f"{f.bytes / MIB:,.1f} MiB"
    return steps, _said(f.epoch), written, f.engine or "-", _said(f.world_size), size, _said(f.tensors), state


def _said(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


@dataclass(frozen=True)
class Verdict:
    """On one checkpoint, after all of it was read."""

    path: Path
    problem: str | None
    checkpoint: Checkpoint | None

    def __str__(self) -> str:
        if self.problem or self.checkpoint is None:
            return f"{self.path}: DAMAGED: {self.problem}"
        meta, specs = self.checkpoint.meta, self.checkpoint.specs()
        trained = [key for key in specs if key.startswith("model/")]
        states = f"optimizer state of {len(trained) - len(meta.without_state)} of {len(trained)}"
        without = f", not of {_brief(meta.without_state)}" if meta.without_state else ""
        return f"{self.path}: whole: {len(meta.files)} files, {len(specs)} tensors, all finite; {states}{without}"


def verify(path: Path) -> Verdict:
    """Reads all of one checkpoint: the files' hashes, then every tensor."""
    try:
        one = opened(path)
        problem = one.damage(contents=True) or _misfit(one) or _unfit(one)
    except UserError as error:
        return Verdict(path, _inside(path, error), None)
    return Verdict(path, problem, one)


def _misfit(one: Checkpoint) -> str | None:
    """Which tensors are missing, left over or of a shape that is not their parameter's."""
    specs = one.specs()
    shapes = {key.removeprefix("model/"): shape for key, (shape, _) in specs.items() if key.startswith("model/")}
    states: dict[str, set[str]] = {}
    for key, (shape, _) in specs.items():
        kind, _, name = key.partition("/")
        state = ""
        if kind == "optimizer":
            name, _, state = name.rpartition("/")
            states.setdefault(name, set()).add(state)
        if name not in shapes:
            return f"{key} belongs to no tensor of the model"
        if shape != shapes[name] and state not in (COUNT, *TABLES):
            return f"{key} has shape {list(shape)}, and the tensor of the model {list(shapes[name])}"
    lost = sorted(shapes.keys() - states.keys() - set(one.meta.without_state))
    if lost:
        return f"lacks the optimizer state of {_brief(lost)}"
    every = {state for found in states.values() for state in found} - set(TABLES)
    for name, found in states.items():
        if every - found:
            return f"lacks optimizer/{name}/{min(every - found)}"
    return None


def _unfit(one: Checkpoint) -> str | None:
    """Which tensors are not finite; what no file fills stays NaN."""
    bad = []
    specs = one.specs()
    for keys in _pieces(specs):
        tensors = {key: _unfilled(*specs[key]) for key in keys}
        one.read(tensors)
        bad += [key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    return f"{_brief(bad)} not finite" if bad else None


def _unfilled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype)


def _pieces(specs: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> Iterator[list[str]]:
    """The keys, a few at a time: a laptop need not hold all that a cluster wrote."""
    piece: list[str] = []
    held = 0
    for key, (shape, dtype) in specs.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if piece and held + size > PIECE:
            yield piece
            piece, held = [], 0
        piece.append(key)
        held += size
    yield piece


def _brief(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def export(path: Path, to: Path, ema: bool) -> Checkpoint:
    """Writes the adapter file of a checkpoint, or of a run's newest whole one, which it returns.

    UserError where the file exists, where nothing is whole, or, with `ema`, where there is no moving average.
    """
    check_new(to)
    if not to.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {to.parent}; make it first")
    one = _newest_whole(path)
    tensors = _named(one, "model/")
    if ema:
        averages = _named(one, "ema/")
        if not averages:
            raise UserError(f"{one.path}: has no moving average, since optim.ema_decay was null; leave out --ema")
        tensors |= {name: average.to(tensors[name].dtype) for name, average in averages.items()}
    meta = one.meta
    adapter.save(to, tensors, adapter.Belongs(meta.base, meta.base_sha256, meta.method, meta.classes))
    return one


def _named(one: Checkpoint, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in one.tensors(prefix).items()}


def _newest_whole(path: Path) -> Checkpoint:
    verdicts: list[Verdict] = []
    for place in reversed(places(path)):
        verdict = verify(place)
        if verdict.checkpoint and not verdict.problem:
            for passed in verdicts:
                log.warn(f"passed over: {passed}")
            return verdict.checkpoint
        verdicts.append(verdict)
    others = (
        f"none of {len(verdicts)} is whole" if len(verdicts) > 1 else "see snell checkpoint ls for others of its run"
    )
    raise UserError(f"{verdicts[0]}; {others}")


@dataclass(frozen=True)
class Converted:
    """`layout`: what `backbone.weights` takes the file for, or why it does not."""

    file: Path
    tensors: int
    layout: str


def convert(folder: Path, to: Path, trust: bool) -> Converted:
    """Writes a DeepSpeed checkpoint's weights (ZeRO 1, 2 or 3) into a new folder: one file, safetensors, float32.

    DeepSpeed's converter unpickles, which runs what is in the files: UserError without `trust`.
    """
    root, tag = _deepspeed(folder)
    check_new(to)
    if not trust:
        risk = "DeepSpeed's files are pickles, and its converter runs what is in them"
        raise UserError(f"{folder}: {risk}; add --trust where you know who wrote them")
    tensors = _as_float32(_consolidated(root, tag))
    with new_folder(to) as place:
        tensor_files.write_tensors(place / WEIGHTS, tensors, {"format": "pt"})
    try:
        layout = f"backbone.weights={to} reads it as {weights.read(to).layout}"
    except UserError as error:
        layout = str(error)
    return Converted(to / WEIGHTS, len(tensors), layout)


def _deepspeed(folder: Path) -> tuple[Path, str]:
    """The folder that DeepSpeed's `save_checkpoint` was given, and the step in it. UserError where it is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {_no_folder(folder)}; {DEEPSPEED}")
    if _is_step(folder):
        root, tag = folder.parent, folder.name
    else:
        root, tag = folder, _tag(folder)
    if not any((root / tag).glob("*_optim_states.pt")):
        plain = root / tag / PLAIN
        instead = f"; backbone.weights={plain} reads it as it is" if plain.is_file() else ""
        raise UserError(f"{root / tag}: has no *_optim_states.pt, so ZeRO 1, 2 or 3 did not write it{instead}")
    return root, tag


def _is_step(folder: Path) -> bool:
    return any(folder.glob("*_model_states.pt"))


def _tag(folder: Path) -> str:
    """The step that `latest` names."""
    steps = sorted((p.name for p in folder.iterdir() if _is_step(p)), key=lambda name: (len(name), name))
    latest = folder / LATEST
    if not steps:
        ours = (folder / META, folder / FOLDER, *folder.glob("step_*"))
        own = "it is of snell_dist, and snell checkpoint export makes an adapter file of it"
        raise UserError(f"{folder}: is no DeepSpeed checkpoint; {own if any(p.exists() for p in ours) else DEEPSPEED}")
    instead = f"name a step itself, such as {folder / steps[-1]}"
    if not latest.is_file():
        raise UserError(f"{folder}: has no `{LATEST}` that says which step; {instead}")
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if tag not in steps:
        raise UserError(f"{latest}: names {tag!r}, which is not there; {instead}")
    return tag


def _consolidated(root: Path, tag: str) -> dict[str, Tensor]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it looks for a device when it is imported
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it speaks of every step
        try:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        except ImportError:
            raise UserError(f"{root}: to read it needs DeepSpeed: pip install '{EXTRA}'") from None
        try:
            state = get_fp32_state_dict_from_zero_checkpoint(str(root), tag)
            return _left_out(root / tag / PLAIN, state) | state
        except Exception as error:  # DeepSpeed's and pickle's errors have no common class
            said = f"DeepSpeed's converter fails: {first_line(error)}"
            raise UserError(f"{root / tag}: {said}; is every rank's file there and whole?") from None


def _left_out(file: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of ZeRO 1 the converter forgets the frozen parameters; they are in the model's own file, which ZeRO 3 lacks."""
    if not file.is_file():
        return {}
    module = torch.load(file, map_location="cpu", mmap=True, weights_only=False)["module"]
    return {name: tensor for name, tensor in module.items() if name not in state and isinstance(tensor, Tensor)}


def _as_float32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Integers and masks stay; tied tensors become copies, since a safetensors file has each by itself."""
    result: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        result[name] = tensor.clone() if tensor.data_ptr() in known else tensor
        known.add(tensor.data_ptr())
    return result
