"""Pages as their readers use them: blocks of commands and code, carried out as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import ENVIRONMENT, ROOT

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


def carry_out(page: Path, folder: Path, package: Path = ROOT) -> None:
    """Runs a page's blocks in order, in one folder: bash and python; one that begins with a file's name is that file.

    A block of text says what the block before it prints: its lines, in their order, whatever their numbers; what
    stands beside `...` is not looked at. package: where snell_dist is.
    """
    said = None
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.language == "bash":
            said = _output(["bash", "-euo", "pipefail", "-c", block.text], block, folder, package)
        elif block.language == "python":
            said = _output([sys.executable, "-c", block.text], block, folder, package)
        elif block.language == "text" and said is not None:
            _compare(block, said)
            said = None


def _output(command: list[str], block: Block, folder: Path, package: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT | {"PATH": path, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1"},
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
        if block.language != "bash":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            starts = [i for i, word in enumerate(words) if word in ("snell", "snell_dist")]
            for start in starts[:1]:
                rest = words[start + 1 :]
                yield block, rest[: next((i for i, word in enumerate(rest) if word in ENDS), None)]
