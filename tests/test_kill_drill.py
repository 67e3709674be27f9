"""The drill on few kills: real processes die, resume, and come to the end that nobody killed."""

import random
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT, train, trained

sys.path.insert(0, str(ROOT / "profiling"))
import kill_drill


@pytest.mark.parametrize(("name", "kills"), [("one process", 2), ("fsdp", 1)])
def test_a_killed_run_comes_to_the_same_end(name: str, kills: int, tmp_path: Path) -> None:
    case = next(case for case in kill_drill.CASES if case.name == name and not case.background)
    steps = kill_drill.STEPS * kills
    # one process that accumulates as many micro-batches as there are ranks has the same bits
    alone = [*kill_drill.SMALL, f"train.steps={steps}", f"data.micro_batch_size={12 // case.ranks}"]
    adapter = trained(train(tmp_path, *alone).folder)
    tally = kill_drill.drill(case, kills, steps, random.Random(0), tmp_path / "run", adapter)
    row = asdict(tally) | {"environment": kill_drill.environment()}
    assert kill_drill.sound(row), tally
    assert sum(tally.kills.values()) == kills
    assert f"{kills} kills" in kill_drill.markdown([row])


def test_what_is_torn_lost_or_left_is_counted(tmp_path: Path) -> None:
    tally = kill_drill.Tally("ddp", False)
    folder = train(tmp_path, "method.rank=4", "train.log_every=1").folder
    assert folder is not None
    assert kill_drill._look(folder, 6, 0, tally) == 6
    assert not (tally.torn or tally.lost or tally.temporary)
    part = folder / "checkpoints/step_00000006/__0_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    (folder / "checkpoints/.tmp_step_00000007").mkdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[1:]))
    kill_drill._look(folder, 8, 6, tally)
    assert tally.torn == ["step_00000006: __0_0.distcp has other contents than were written"]
    assert tally.lost == ["step 8 was done, 6 saved before, and 6 is the newest", "metrics.jsonl lacks 1 of 6 steps"]
    assert tally.temporary == 1
