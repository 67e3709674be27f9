"""Files that are whole or absent, and really on the disk."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_atomic(file: Path, text: str) -> None:
    """The whole new text or the old one, whatever happens meanwhile."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


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
