"""Files that are whole or absent, and really on the disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from snell_dist.config import UserError


def write_atomic(file: Path, content: str | bytes) -> None:
    """The whole new content or the old one, whatever happens meanwhile."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        error.filename = error.filename or str(file)  # what a full disk raises has none
        raise


def check_new(to: Path) -> None:
    """UserError where what `--to` names is there already."""
    if os.path.lexists(to):
        raise UserError(f"--to {to}: exists and stays as it is; choose another name")


@contextmanager
def new_folder(to: Path) -> Iterator[Path]:
    """A temporary folder that gets its name at the end, or goes."""
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=".tmp", dir=to.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(to)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Flushes a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Of the file's bytes, a piece at a time."""
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
