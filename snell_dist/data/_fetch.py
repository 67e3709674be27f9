"""Shards that are not files here: each is fetched once, whole and checked, into a folder."""

from __future__ import annotations

import fcntl
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from snell_dist import log
from snell_dist.config import ConfigError, Problem, UserError, first_line
from snell_dist.data._tar import Damaged


def is_remote(url: str) -> bool:
    """Whether a path names a stream: pipe:, http:// and so on."""
    return re.match(r"pipe:|\w[\w+.-]*://", url) is not None and not url.startswith("file:")


def local(url: str, cache: str | None, check: Callable[[Path], object]) -> Path:
    """The file itself, or what was fetched of a stream; processes that want the same wait for the one that fetches.

    `check` sees a fetched file before the cache has it. Damaged where it says so or nothing comes. ConfigError where
    there is no cache.
    """
    if not is_remote(url):
        return Path(re.sub("^file:(//)?", "", url))
    if cache is None:
        message = (
            f"is needed for {url}: a stream has no exact order, continuation and evaluation;"
            " name a folder, where each shard is kept once it was fetched"
        )
        raise ConfigError(Problem("data.cache", message))
    name = re.sub(r"[^\w.-]+", "_", url)[-80:]
    file = Path(cache) / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    with _lock(file.parent):
        if not file.exists():
            log.info(f"fetching {url}")
            temporary = file.with_name(f".{file.name}.tmp")
            try:
                _fetch(url, temporary)
                check(temporary)
                temporary.replace(file)
            except UserError as error:
                kind = Damaged if isinstance(error, Damaged) else UserError
                raise kind(str(error).replace(str(temporary), url)) from None
            finally:
                temporary.unlink(missing_ok=True)
    return file


def _fetch(url: str, file: Path) -> None:
    from webdataset.gopen import gopen, gopen_schemes

    scheme = url.partition(":")[0]
    if scheme not in gopen_schemes:
        known = ", ".join(sorted(set(gopen_schemes) - {"__default__"}))
        raise UserError(f"{url}: unknown scheme {scheme} (allowed: {known}; for s3, pipe:aws s3 cp {url} -)")
    try:
        with gopen(url, "rb") as stream, file.open("wb") as target:
            shutil.copyfileobj(stream, target, 1 << 20)
    except OSError as error:
        status = re.search(r"exit \d+", str(error))  # of the program that webdataset fetches with
        raise Damaged(f"{url}: cannot be fetched ({status[0] if status else first_line(error)})") from None


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("w")
    except OSError as error:
        message = f"cannot be written: {error.strerror}"
        raise ConfigError(Problem("data.cache", message, str(folder))) from None
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
