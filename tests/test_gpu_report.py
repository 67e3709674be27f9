"""The GPU report without a GPU: its rehearsal in real processes, and its tables of what only a GPU would say."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conftest import ENVIRONMENT, ROOT

sys.path.insert(0, str(ROOT / "profiling"))

import gpu_case
import gpu_report
import gpu_tables

from snell_dist.memory.gpus import MIB

STEP = "SNELL-8 on ViT small, batch 8, float32, remat none, attention fused"
LAYER = "operator 96x384 in float32"


def rehearse(out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The JSON, and what the terminal was told."""
    command = [sys.executable, str(ROOT / "profiling/gpu_report.py"), "--rehearse", "--out", str(out), *options]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(out.with_suffix(".json").read_text()), done.stderr


def outcome(case: gpu_report.Case, limit: float = 60.0, budget: float = 60.0) -> gpu_report.Outcome:
    runner = gpu_report.Runner("cpu", limit, time.monotonic() + budget)
    (found,) = runner.all([case])
    return found


def test_a_rehearsal_writes_everything_and_says_what_it_is(tmp_path: Path) -> None:
    out = tmp_path / "gpu_rehearsal"
    report, said = rehearse(out, "--only", STEP, LAYER)
    assert report["mark"] == gpu_tables.MARK
    _, step, layer = sorted(report["cases"], key=lambda entry: ["machine", "memory", "operator"].index(entry["kind"]))
    assert not any(entry["problem"] for entry in report["cases"])
    assert report["machine"]["device"] == "cpu"
    assert abs(step["error"]) < 0.005
    assert abs(step["allocator_error"]) < 0.005
    parts = [*step["categories"], *step["blocks"]]
    assert all(abs(predicted - true) <= max(0.01 * true, 1024) for _, predicted, true, _ in parts)
    assert sum(true for _, _, true, _ in step["categories"]) == step["recorded_bytes"]
    assert layer["seconds_by_method"].keys() == layer["peak_mib"].keys() >= {"ours", "PEFT LoRA", "frozen"}
    text = out.with_suffix(".md").read_text()
    for file_text in (said, text, out.with_suffix(".html").read_text()):
        assert gpu_tables.MARK in file_text
    assert f"{step['predicted_bytes'] / MIB:.1f} MiB" in text
    assert out.with_suffix(".csv").read_text().count("SNELL-8") == 2
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_a_case_that_fails_costs_its_own_row() -> None:
    layers = {"in_features": 96, "out_features": 384, "tokens": 136, "rank": 97}
    failed = outcome(gpu_report.layer(layers, "float32"))
    assert failed.found is None
    assert re.match(r"failed \(status 1\): ValueError: rank must be a positive multiple of 2", failed.problem or "")
    report = gpu_tables.as_json(True, gpu_report.environment() | {"device": "cpu"}, 60, [failed], 1)
    assert f"| operator 96x384 in float32 | {failed.problem} |" in gpu_tables.markdown(report)
    assert gpu_tables.page(report, [failed]) is None


def test_a_case_that_takes_too_long_is_ended() -> None:
    begin = time.monotonic()
    late = outcome(gpu_report.memory("SNELL-8", "ViT small"), limit=0.5)
    assert late.problem == "too slow: more than 0.5 s"
    assert time.monotonic() - begin < 10


def test_the_budget_leaves_out_the_last() -> None:
    begin = time.monotonic()
    runner = gpu_report.Runner("cpu", 60, begin + gpu_report.LEAST_S + 5)
    cases = [gpu_report.Case(f"the machine, time {number}", "machine") for number in range(100)]
    found = {each.case.name: each for each in runner.all(cases)}
    assert time.monotonic() - begin < gpu_report.LEAST_S + 8
    first, last = found[cases[0].name], found[cases[-1].name]
    assert first.found is not None
    assert first.found["device"] == "cpu"
    assert (last.found, last.problem) == (None, "left out: the time is over")
    report = gpu_tables.as_json(True, first.found, 10, list(found.values()), 10)
    assert f"| {last.case.name} | left out: the time is over |" in gpu_tables.markdown(report)
    assert f"| {first.case.name} |" not in gpu_tables.markdown(report)


def test_what_only_a_gpu_shows() -> None:
    """As on a card that holds 100 MiB of others, where the driver knows no processes."""
    small = gpu_report.memory("SNELL-8", "ViT small")
    told = {"device": "cpu", "capability": (8, 0), **small.said}
    found = json.loads(json.dumps(gpu_case.memory(told)(torch.device("cpu"))))
    held, peak = sum(found["measured"]["held"].values()), found["measured"]["peak_bytes"]
    said = {"allocated": held + 8 * MIB, "allocated_peak": peak + 11 * MIB, "reserved": peak + 21 * MIB}
    said |= {"reserved_peak": peak + 21 * MIB, "used": peak + 21 * MIB + 400 * MIB + 100 * MIB}
    case = gpu_report.memory("SNELL-8", "ViT-B/16", attention="explicit")
    on_a_gpu = gpu_report.Outcome(case, 1.0, {**found, "device": said, "allocated_bytes": said["allocated_peak"]})
    about = gpu_report.environment() | {
        "device": "a GPU", "idle_bytes": 100 * MIB, "memory_bytes": 2**30, "driver": None, "settings": {},
    }  # fmt: skip
    report = gpu_tables.as_json(False, about, 510, [on_a_gpu], 1)
    parts = {"workspace": 8, "kernels": 3, "fragmentation": 10, "context": 400}
    assert report["cases"][0]["only_a_gpu"] == {name: size * MIB for name, size in parts.items()}
    page = gpu_tables.page(report, [on_a_gpu])
    assert page is not None
    assert gpu_tables.MARK not in page.title
    assert page.rows[0].beyond == 421 * MIB
    text = gpu_tables.markdown(report)
    assert re.search(r"\| context \| 400.0 MiB \| .* \| 450.0 MiB \|", text)
    paper = said["allocated_peak"] / 1e6 / 1673 - 1
    assert f"| SNELL-8 | ViT-B/16 | {said['allocated_peak'] / 1e6:,.0f} | 1,673 | {paper:+.1%} |" in text
    said["process"] = peak + 321 * MIB
    assert gpu_tables.only_a_gpu({**found, "device": said}, 100 * MIB)["context"] == 300 * MIB, (
        "the driver's own figure comes first"
    )


def test_every_case_has_a_name_of_its_own(tmp_path: Path) -> None:
    for planned in (gpu_report.cases(tmp_path / "gpu"), gpu_report.rehearsed(tmp_path / "gpu")):
        assert len({case.name for case in planned}) == len(planned)
        kinds = {case.kind for case in planned}
        assert kinds == {"memory", "steps", "operator", "snapshot"}
