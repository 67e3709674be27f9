"""The folder that explains a run: what ran, on what, with which result; never overwritten.

runs/<config>/<number>/
    config.yaml      resolved: every key with the value that was in force
    run.json         exact command, versions, git commit, host, seeds; one entry an attempt
    metrics.jsonl    train.log
    oom_rank0.txt    where a rank ran out of memory, and what would help
    checkpoints/     step_000200/, to resume from
    adapter.safetensors   what was trained, to take away
    summary.json     written last: a folder that has it is complete
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import yaml

from snell_dist import dist
from snell_dist.config import PACKAGE, Section, UserError, trouble
from snell_dist.files import write_atomic

# How a run computes, and not what: these may be others when it goes on.
FREE = (
    "engine.", "remat.", "data.micro_batch_size", "data.eval_batch_size", "data.workers", "train.device",
    "train.log_every", "train.save_every", "train.save_in_background", "train.keep", "train.track",
    "train.hang_timeout_s",
)  # fmt: skip
PACKAGES = ("snell_dist", "torch", "timm", "torchmetrics", "numpy", "safetensors", "pydantic")


# "if any": continue what has begun, else begin it, for whoever starts again and again.
Resume = bool | Literal["if any"]


def choose(out: Path, name: str, config: Section, resume: Resume, folder: Path | None) -> Path | None:
    """The existing folder to continue in, or None for a new one.

    Raises UserError where the wish does not fit what is there.
    """
    if folder is None:
        found = newest(out, name, config) if resume else None
        if resume is True and found is None:
            raise UserError(f"--resume: {out / name} has no run of this configuration; start one without --resume")
        return found
    if not _begun(folder):
        if resume is True:
            raise UserError(f"--resume: {folder}: no such run folder")
        return None
    if not resume:
        raise UserError(f"{folder}: exists; continue there with --resume, or name another folder")
    different = differences(folder, config)
    if different:
        raise UserError(f"{folder}: was made by another configuration (they differ in {', '.join(different)})")
    return folder


def config_of(folder: Path) -> Path:
    """The resolved configuration of a run folder. UserError where there is none."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is no run folder (it has no config.yaml)")
    return folder / "config.yaml"


def create(out: Path, name: str, config: Section, folder: Path | None = None) -> Path:
    """The named folder, or a new numbered one, safe against other runs that start at the same time."""
    parent = out / name if folder is None else folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if folder is None:
            folder = _number(parent)
        else:
            folder.mkdir(exist_ok=not _begun(folder))
        write_atomic(folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
    except OSError as error:
        raise trouble(f"{folder or parent}: cannot make a run folder there", error) from None
    return folder


def _begun(folder: Path) -> bool:
    """Whether anything is there; a run that was killed before its first word left nothing to lose."""
    return folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir()))


def _number(parent: Path) -> Path:
    number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0)
    while True:
        number += 1
        try:
            (parent / f"{number:03d}").mkdir()
            return parent / f"{number:03d}"
        except FileExistsError:
            continue


STOP = ".stop"  # to touch it is to ask the run to save and stop


def saved_at(folder: Path) -> int:
    """When a checkpoint was last completed, in nanoseconds by the file system's clock; 0 before the first."""
    try:
        return (folder / "checkpoints" / "latest").stat().st_mtime_ns
    except OSError:
        return 0


class Busy(UserError):
    """Another process is at work there."""


@contextmanager
def lock(folder: Path, name: str = ".lock", patience_s: float = 0.0) -> Iterator[None]:
    """Keeps other processes out; the lock ends with the process, however it ends.

    Raises Busy, on every rank, where another process has it and does not end within `patience_s`.
    """
    import fcntl

    stack, end = ExitStack(), time.monotonic() + patience_s

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stream = stack.enter_context((folder / name).open("w"))
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise Busy(f"{folder}: another process is training there") from None
                time.sleep(0.1)

    with stack:
        dist.first_does(take)
        yield


def is_complete(folder: Path) -> bool:
    return (folder / "summary.json").exists()


def read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Last of all: it marks the run as complete."""
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2))


def newest(out: Path, name: str, config: Section) -> Path | None:
    """The newest run of this configuration."""
    parent = out / name
    folders = (
        sorted((p for p in parent.glob("*") if p.name.isdigit()), key=lambda p: -int(p.name)) if parent.is_dir() else []
    )
    return next((folder for folder in folders if not differences(folder, config)), None)


def differences(folder: Path, config: Section) -> list[str]:
    """Dotted keys whose values in the folder's configuration are not this one's, but for FREE ones."""
    return [key for key in _changes(folder, config) if not key.startswith(FREE)]


def _changes(folder: Path, config: Section) -> list[str]:
    try:
        stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: not a run folder (it has no config.yaml)") from None
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'config.yaml'}: cannot be read: {error}") from None
    return sorted({key for key, _ in _flat(stored).items() ^ _flat(config.model_dump()).items()})


def attempts(folder: Path) -> list[dict[str, Any]]:
    """What run.json says of each start of the run, the first one first."""
    file = folder / "run.json"
    return json.loads(file.read_text()) if file.exists() else []


def record_attempt(folder: Path, config: Section, about: Mapping[str, Any]) -> int:
    """Adds this start of the run to run.json, with what is not as in its config.yaml. Returns its number, from 1."""
    before = attempts(folder)
    said = _flat(config.model_dump())
    before.append(
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "folder": os.getcwd(),
            "host": platform.node(),
            "job": os.environ.get("SLURM_JOB_ID"),
            **about,
            "cpu_count": os.cpu_count(),
            "world_size": dist.world_size(),
            "changed": {key: said.get(key) for key in _changes(folder, config)},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "versions": {name: installed(name) for name in PACKAGES},
            "git": _git_commit(),
        }
    )
    write_atomic(folder / "run.json", json.dumps(before, indent=2))
    return len(before)


def _flat(tree: Any, key: str = "") -> dict[str, str]:
    if not isinstance(tree, dict):
        return {key: repr(tree)}
    return {
        k: v for name, value in tree.items() for k, v in _flat(value, f"{key}.{name}" if key else str(name)).items()
    }


def installed(name: str) -> str | None:
    """The version of a package; None where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The checkout's commit, with `-dirty` where files differ; None for an installed package."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
