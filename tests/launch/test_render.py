"""Scripts filled in by a plan are whole programs that do what the plan says."""

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TINY
from test_scripts import shellcheck

from snell_dist.config import UserError, load
from snell_dist.launch import machine, plan, render, submit
from snell_dist.launch.plan import Plan, Wish
from snell_dist.run_config import Run

HEADERS = """#!/usr/bin/env bash
# A script.
#SBATCH --nodes=1
#SBATCH --time=04:00:00            # why
#SBATCH --requeue                  # and why
set -euo pipefail
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without runs; a machine without Slurm and GPUs, as renderings differ by them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "partitions", list)
    monkeypatch.setattr(machine, "gpus", lambda: 0)
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")


WISHES = {
    "torchrun": Wish("torchrun", processes_per_node=2),
    "torchrun on two": Wish("torchrun", hostfile=Path("hosts"), nodes="1:2"),
    "deepspeed": Wish("deepspeed", hostfile=Path("hosts")),
    "slurm": Wish("slurm", nodes="2", gpus_per_node="a100:4", options={"account": "me"}, partition="gpu"),
    "slurm tasks": Wish("slurm", "tasks", nodes="2", processes_per_node=2, gpus_per_node="0", run="my runs/a"),
    "slurm deepspeed": Wish("slurm", "deepspeed", nodes="1:2", port=29999),
    "slurm container": Wish("slurm", container="/images/a b.sif"),
}


def made(wish: Wish, *overrides: str) -> tuple[Plan, str]:
    words = [*TINY, "data.batch_size=64", *overrides]
    planned = plan.make(load("demo", words, Run), "demo", words, wish)
    return planned, render.render(planned, "snell launch demo")


def run(script: str, *words: str) -> list[list[str]]:
    """What it would run."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_"))} | {"DRY_RUN": "1"}
    command = ["bash", "-c", script, "script", *words]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_a_rendered_script_is_clean(wish: Wish, tmp_path: Path) -> None:
    _, script = made(wish, "optim.lr=1e-3")
    (tmp_path / "script").write_text(script)
    assert subprocess.run(["bash", "-n", "script"], check=False).returncode == 0
    done = subprocess.run([shellcheck(), "script"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_a_rendered_script_trains_what_was_said_and_more_words_are_added(wish: Wish) -> None:
    planned, script = made(wish, "optim.lr=1e-3")
    command = run(script, "train.seed=7")[-1]
    folder = planned.run.replace("<job id>", "0")
    words = command[command.index("train") :]
    wanted = ["train", "demo", *TINY, "data.batch_size=64", "optim.lr=1e-3", "train.seed=7", "--folder", folder]
    assert words == [*wanted, "--resume-if-any"]
    assert command[4:7] == [folder, "--grace", "120"]


def test_a_plans_numbers_are_in_the_script() -> None:
    lines = made(WISHES["slurm"])[1].splitlines()
    for line in (
        "nodes=2",
        "gpus-per-node=a100:4",
        "cpus-per-task=32",
        "signal=B:USR1@180",
        "partition=gpu",
        "account=me",
    ):
        assert any(said.split(" #")[0].strip() == f"#SBATCH --{line}" for said in lines), line
    lines = made(WISHES["slurm tasks"])[1].splitlines()
    assert not any("--gpus-per-node" in line for line in lines if line.startswith("#SBATCH"))
    command = run(made(WISHES["torchrun on two"])[1])[-1]
    assert {"--nnodes=1:2", "--nproc-per-node=2"} <= set(command)
    assert any(word.startswith("--rdzv-endpoint=a:") for word in command)
    assert "29999" in run(made(WISHES["slurm deepspeed"])[1])[-1]


def test_nothing_in_a_word_is_executed(tmp_path: Path) -> None:
    """Neither in the words, nor in the settings, nor in the comment that names the command."""
    word = f'backbone.weights=it\'s "$(touch {tmp_path}/four)"'
    wish = replace(WISHES["slurm"], run=f"$(touch {tmp_path}/one); `touch {tmp_path}/two`")
    planned, _ = made(wish, word)
    script = render.render(planned, f"snell launch 'a\ntouch {tmp_path}/three\n'")
    command = run(script)[-1]
    assert command[4] == wish.run
    assert word in command
    assert {p.name for p in tmp_path.iterdir()} == {"hosts"}


def test_header_lines_are_replaced_added_and_left_out() -> None:
    text = render.with_options(HEADERS, {"time": "1-00:00:00", "nodes": None, "partition": "gpu"})
    assert text == HEADERS.replace("04:00:00  ", "1-00:00:00").replace("#SBATCH --nodes=1\n", "").replace(
        "and why\n", "and why\n#SBATCH --partition=gpu\n"
    )


def test_to_replace_twice_is_to_replace_once() -> None:
    for name in render.shipped():
        text = (render.SCRIPTS / name).read_text()
        options = {"time": "10:00", "partition": "gpu", "signal": "B:USR1@600", "gpus-per-node": None}
        if name.endswith(".sbatch"):
            once = render.with_options(text, options)
            assert render.with_options(once, options) == once != text
        assert render.with_options(text, {}) == text


def test_every_script_is_shipped() -> None:
    names = {"torchrun.sh", "deepspeed.sh", "slurm/interactive.sh"}
    names |= {f"slurm/{kind}.sbatch" for kind in ("torchrun", "tasks", "deepspeed", "container", "reproduce")}
    assert set(render.shipped()) == names


def test_a_script_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    submit.write("one", tmp_path / "a.sh")
    with pytest.raises(UserError, match="exists and stays as it is"):
        submit.write("two", tmp_path / "a.sh")
    assert (tmp_path / "a.sh").read_text() == "one"
    assert os.access(tmp_path / "a.sh", os.X_OK)
    with pytest.raises(UserError, match="cannot be written"):
        submit.write("two", tmp_path / "missing" / "a.sh")
