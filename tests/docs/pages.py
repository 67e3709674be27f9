"""Pages as their readers use them: blocks of commands and code, carried out as printed."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from conftest import ENVIRONMENT, ROOT

from snell_dist.cli import main

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"# (\S+\.(?:yaml|py))\n")
NUMBER = re.compile(r"\d[\d,.:]*(e[-+]\d+)?")
ENDS = "|", ">", "&&", ">>"  # of one command's words


@dataclass(frozen=True)
class Block:
    """What stands between two fences. line: of its first fence, from 1."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that it is, if it says so in its first line."""
        found = FILE.match(self.text)
        return found and found[1]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """README.md and every page that is written by hand."""
    return [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(page, text.count("\n", 0, f.start()) + 1, f[1], f[2]) for f in FENCE.finditer(text)]


def carry_out(page: Path, folder: Path, package: Path | None = None) -> None:
    """Runs a page's blocks in order, in one folder: bash and python; one that begins with a file's name is that file.

    A block of text says what the block before it prints: its lines, in their order, whatever their numbers; what
    stands beside `...` is not looked at. package: another place of snell_dist; then every block is a process of its
    own, and else only what needs a shell is.
    """
    said = None
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.language == "bash" and package:
            said = _process(["bash", "-euo", "pipefail", "-c", block.text], block, folder, package)
        elif block.language == "bash":
            lines = block.text.replace("\\\n", " ").splitlines()
            said = "".join(_line(line, block, folder) for line in lines)
        elif block.language == "python":
            said = _here(lambda text=block.text: exec(text, {}), folder)
        elif block.language == "text" and said is not None:
            _compare(block, said)
            said = None


def _line(line: str, block: Block, folder: Path) -> str:
    """What one line of a shell prints."""
    words = shlex.split(line, comments=True)
    if words[0] != "snell" or set(words) & set(ENDS):
        return _process(["bash", "-euo", "pipefail", "-c", line], block, folder, ROOT)

    def typed() -> None:
        assert main(words[1:]) == 0, f"{block}: {line}"

    return _here(typed, folder)


def _here(call: Callable[[], object], folder: Path) -> str:
    """What a call in this process prints, which has imported most of what is needed."""
    out, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with redirect_stdout(out), redirect_stderr(out):
            call()
    finally:
        os.chdir(before)
    return out.getvalue()


def _process(command: list[str | Path], block: Block, folder: Path, package: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT | {"PATH": path, "PYTHONPATH": str(package)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    return done.stderr + done.stdout


def _compare(block: Block, said: str) -> None:
    lines = iter([_masked(line) for line in said.splitlines()])
    for line in block.text.splitlines():
        pattern = ".*".join(map(re.escape, _masked(line).split("...")))
        assert any(re.fullmatch(pattern, found) for found in lines), f"{block}: not printed: {line}\n{said}"


def _masked(line: str) -> str:
    return NUMBER.sub("0", " ".join(line.split()))


def commands(page: Path) -> Iterator[tuple[Block, list[str]]]:
    """Every command of `snell` on a page, as words."""
    for block in blocks(page):
        if block.language not in ("bash", "sh"):  # sh: what is not carried out, since it takes another machine
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word in ("snell", "snell_dist")]
            for start in starts[:1]:
                rest = words[start + 1 :]
                yield block, rest[: next((i for i, word in enumerate(rest) if word in ENDS), None)]
