"""What a terminal shows, on a real pseudo-terminal."""

import os
import pty
import subprocess
from pathlib import Path

from conftest import ENVIRONMENT, TINY, command


def test_a_terminal_gets_a_progress_bar_and_the_log_file_plain_lines(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command("train", "demo", *TINY, "method.rank=4", "train.steps=40"),
        env=ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "120"},
        cwd=tmp_path,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other side has closed
            break
        if not piece:
            break
        shown += piece
    assert process.wait(timeout=60) == 0, shown.decode()
    os.close(ours)
    assert b"\x1b[" in shown
    assert "━".encode() in shown
    assert b"40/40" in shown
    assert b"steps/s" in shown
    assert b"test accuracy" in shown
    log = (tmp_path / "runs/demo/001/train.log").read_text()
    assert "\x1b" not in log
    assert "parameters train" in log
