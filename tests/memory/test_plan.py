"""`snell plan` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import yaml
from conftest import ENVIRONMENT

from snell_dist.cli import main
from snell_dist.config import check, load
from snell_dist.footprint import Category, Footprint, Moment, Phase
from snell_dist.memory import gpus, plan
from snell_dist.memory.overhead import Overhead
from snell_dist.memory.plan import Machine
from snell_dist.memory.predict import Predictor
from snell_dist.run_config import Run

GIB = 2**30
SMALL = ["backbone.size=small", "data.batch_size=64", "backbone.weights=null"]


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", "scale/common", *SMALL, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_says_what_a_rank_needs(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "--gpus", "8", "--nodes", "2", "--gpu-memory", "24GiB")
    assert said["fits"] and said["peak_bytes"] == sum(said["categories"].values())
    assert set(said["categories"]) == {category.value for category in Category}
    assert said["needed_bytes"] == said["peak_bytes"] + sum(said["estimated_bytes"].values())
    engines = {(o["engine"]["name"], o["engine"].get("stage"), o["remat"]) for o in said["options"]}
    assert {("ddp", None, r) for r in ("none", "selective", "block")} < engines
    assert {("zero", s, "none") for s in (1, 2, 3)} < engines and ("fsdp", None, "block") in engines
    by_words = {(o["engine"]["name"], o["engine"].get("frozen"), o["remat"]): o for o in said["options"]}
    ddp, sharded = by_words["ddp", None, "none"], by_words["fsdp", "shard", "none"]
    assert sharded["peak_bytes"] < ddp["peak_bytes"] and sharded["wire_bytes"] > ddp["wire_bytes"]
    assert by_words["ddp", None, "block"]["peak_bytes"] < ddp["peak_bytes"]
    assert min(o["relative_step"] for o in said["options"]) == 1


def test_more_images_need_a_cheaper_way(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "data.batch_size=512", "--gpus", "1", "--gpu-memory", "6GiB")
    assert not said["fits"] and said["choice"]["fits"]
    choice = said["choice"]
    assert choice["micro_batches"] * choice["micro_batch_size"] == 512
    config = load("scale/common", [*SMALL, "data.batch_size=512"], Run).config
    changed = check(merged(config.model_dump(exclude_unset=True), said["delta"]), Run)  # the YAML that is proposed
    option = plan.own(changed, Machine(1, 1, gpus.find(None, "6GiB")), Overhead())
    assert option.bytes == pytest.approx(choice["needed_bytes"], rel=0.001)


def merged(tree: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    return tree | {key: tree.get(key, {}) | value if "name" not in value else value for key, value in delta.items()}


def test_largest_micro_batch_is_the_largest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "--gpus", "1", "--gpu-memory", "4GiB", "--overhead", "fragmentation=0")
    room = 4 * GIB - sum(said["estimated_bytes"].values())
    predictor = Predictor(load("scale/common", SMALL, Run).config)
    most = said["largest_micro_batch"]
    assert predictor.predict(most).footprint.peak_bytes <= room < predictor.predict(most + 1).footprint.peak_bytes


def test_text_has_the_verdict_the_table_and_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["engine.name=zero", "--gpus", "4", "--gpu", "rtx4090"]
    assert main(["plan", "scale/common", *SMALL, *words]) == 0
    text = capsys.readouterr().out
    assert "it fits, with" in text and "DDP is better here" in text
    assert yaml.safe_load(text[text.index("\nengine:") :]) == {"engine": {"name": "ddp"}}
    assert "1,000 classes are assumed" in text


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--gpus", "0", "--gpu", "h100"], ["--gpus 0", "one at least"]),
        (["--gpus", "6", "--nodes", "4", "--gpu", "h100"], ["--gpus 6 --nodes 4", "in equal number on every node"]),
        (["--gpus", "1", "--gpu-memory", "80"], ["--gpu-memory 80", "has no unit", "80GiB"]),
        (["--gpus", "1", "--gpu-memory", "lots"], ["--gpu-memory lots", "is no size"]),
        (["--gpus", "1", "--gpu", "h10"], ["--gpu h10", "did you mean 'h100'?", "rtx4090"]),
        (["--gpus", "1"], ["--gpu-memory", "80GiB", "--gpu h100"]),
        (["--gpus", "7", "--gpu", "h100"], ["data.batch_size = 64", "7 ranks"]),
        (["--gpus", "1", "--gpu-memory", "200MiB"], ["nothing fits", "the nearest is", "image", "would do"]),
        (["--gpus", "1", "--gpu", "t4", "--overhead", "contxt=1GiB"], ["did you mean 'context'?"]),
        (["--gpus", "1", "--gpu", "t4", "--overhead", "fragmentation=3"], ["fragmentation=3", "a share"]),
        (["--gpus", "1", "--gpu", "t4", "method.rank=7"], ["method.rank = 7", "must be even"]),
        (["--gpus", "1", "--gpu", "t4", "method.targets=[qq]"], ["method.targets", "matches no linear layer"]),
    ],
)
def test_bad_input_is_one_line(words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "scale/common", *SMALL, *words]) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


WEIGHED = """
import sys
from pathlib import Path
from snell_dist.cli import main
status = main(sys.argv[1:])
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(peak.split()[1], file=sys.stderr)
sys.exit(status)
"""  # (getrusage would begin with the memory of the process that started it)


def test_22_billion_parameters_plan_in_two_gigabytes() -> None:
    words = ["plan", "scale/vit_22b_1024", "--gpus", "1024", "--nodes", "128", "--gpu", "h100", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", WEIGHED, *words], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"]
    assert int(done.stderr.splitlines()[-1]) * 1024 < 2e9


def test_largest_of_straight_lines() -> None:
    """The search against a look at every size."""
    for room in (0, 10, 57, 400, 12345):
        for lines in ([(5, 1)], [(50, 1), (2, 9)], [(9, 0)], [(3, 7), (40, 2), (0, 11)]):

            def needed(n: int, lines: list[tuple[int, int]] = lines) -> int:
                return max(start + slope * n for start, slope in lines)

            flat = needed(1) <= room and all(slope == 0 for _, slope in lines)
            true = plan.MOST_IMAGES if flat else max((n for n in range(1, 20000) if needed(n) <= room), default=0)
            assert plan._largest(needed, room, 8) == true, (room, lines)


def test_a_footprint_survives_its_json() -> None:
    moment = Moment(Phase.RECOMPUTE, "blocks.1", "blocks.1.mlp", {Category.ACTIVATIONS: 7}, {Category.FROZEN: 3})
    footprint = Footprint([moment], {Category.FROZEN: 3}, [])
    assert Footprint.from_json(json.loads(json.dumps(footprint.as_json()))) == footprint
