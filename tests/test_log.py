"""What a terminal shows, on a real pseudo-terminal; what is kept of metrics."""

import os
import pty
import subprocess
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, TINY, command

from snell_dist.log import MetricsFile


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


def test_a_kill_at_the_start_of_a_resumed_run_loses_no_metrics(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    file = tmp_path / "metrics.jsonl"
    before = "".join(f'{{"step": {step}}}\n' for step in range(4))
    file.write_text(before + '{"ste')
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)  # before the new file takes the old one's place
        MetricsFile(file, start=3)
    assert file.read_text() == before + '{"ste'
    MetricsFile(file, start=3)
    assert file.read_text() == before.replace('{"step": 3}\n', "")
