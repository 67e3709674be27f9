"""The two studies of memory, on small settings: real processes, and sentences that their tables bear out."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT

from snell_dist.memory.gpus import in_words


def study(script: str, out: Path) -> list[dict[str, str]]:
    """The table that the script wrote, by lines."""
    command = [sys.executable, str(ROOT / "profiling" / script), "--quick", "--out", str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for ending in (".html", ".csv", ".png", ".md"):
        assert f"{out.with_suffix(ending)}  " in done.stdout
    with out.with_suffix(".csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_methods_are_compared(tmp_path: Path) -> None:
    lines = study("compare.py", tmp_path / "memory")
    peaks = {line["method"]: int(line["peak_bytes"]) for line in lines if line["attention"] == "fused"}
    assert list(peaks) == ["SNELL-8", "LoRA-8", "sparse", "full", "linear", "SNELL-16", "SNELL-32"]
    assert peaks["linear"] < peaks["SNELL-8"] < peaks["SNELL-16"] < peaks["SNELL-32"] < peaks["full"] < peaks["sparse"]
    text = (tmp_path / "memory.md").read_text()
    ratios = [f"{peaks['SNELL-8'] / peaks[m]:.2f} × " for m in ("LoRA-8", "sparse", "full")]
    assert all(ratio in text for ratio in ratios)
    assert f"ViT-B/16: SNELL-8 {in_words(peaks['SNELL-8'])}, LoRA-8 {in_words(peaks['LoRA-8'])}, " in text
    written_out = {line["method"]: int(line["peak_bytes"]) for line in lines if line["attention"] == "explicit"}
    matrices = 12 * 8 * 12 * 197 * 197 * 4  # softmax's output in every block is kept for backward
    assert written_out["LoRA-8"] - peaks["LoRA-8"] == pytest.approx(matrices, rel=0.15)


def test_engines_are_compared(tmp_path: Path) -> None:
    lines = study("scaling.py", tmp_path / "scaling")
    peaks = {(line["engine"], int(line["GPUs"])): int(line["peak_bytes"]) for line in lines}
    assert {gpus for _, gpus in peaks} == {1, 8, 64, 1024}
    assert len(peaks) == len(lines)
    assert {"DDP", "FSDP2 shard", "FSDP2 within nodes", "ZeRO-2", "ZeRO-3 offload"} <= {engine for engine, _ in peaks}
    assert peaks["ZeRO-3", 1024] < peaks["ZeRO-3", 64] < peaks["ZeRO-3", 8] < peaks["DDP", 8]
    (ddp,) = [line for line in lines if line["engine"] == "DDP" and line["GPUs"] == "64"]
    trains = 4 * int(ddp["trainable_parameters"]) / 2**20
    assert float(ddp["wire MiB a step"]) == pytest.approx(2 * trains * 63 / 64, rel=0.01), "a ring's all-reduce"
    assert in_words(peaks["DDP", 1]) in (tmp_path / "scaling.md").read_text()
