"""`snell keep`: real launchers and ranks are killed, stopped and starved, and the run comes to its end nevertheless."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest
import torch
from conftest import digest, snell, train, trained
from disturbed import AROUND, children, family, keeps, lives, pid_of, slow, slowly, started, torchrun, until

from snell_dist import run_folder
from snell_dist.heartbeat import KEPT_BY
from snell_dist.keep import LAUNCHES, Launch, launches, stalls

STEPS = "train.steps=120", "train.save_every=4"
FAILS = ["sh", "-c", "exit 3", "--resume-if-any"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process that takes what each of two takes, which nothing befell."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    torch.set_num_threads(1)  # as there: sums of several threads have other bits
    train(folder.parent, "method.rank=4", "data.micro_batch_size=6", *STEPS, folder=folder)
    return folder


def saves_again(folder: Path, attempt: int = 1) -> None:
    until(lambda: len(run_folder.attempts(folder)) == attempt, f"attempt {attempt}")
    before = run_folder.saved_at(folder)
    until(lambda: run_folder.saved_at(folder) > before, "a newer checkpoint")


def nothing_trains(folder: Path) -> bool:
    return not any(lives(pid_of(folder, rank)) for rank in (0, 1))


@pytest.mark.timeout(1200)
@pytest.mark.xdist_group("keep")
def test_killed_and_stopped_in_every_way_it_comes_to_the_same_end(undisturbed: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    words = keeps(run, torchrun(*slowly(run, *STEPS)))
    slow(run).touch()

    def ends_with(process: subprocess.Popen, status: int) -> None:
        until(lambda: process.poll() is not None, f"the end\n{log.read_text()}")
        assert process.returncode == status, log.read_text()
        assert nothing_trains(run)

    with started(log, words) as kept:
        saves_again(run, attempt=1)
        os.kill(pid_of(run, 1), signal.SIGKILL)
        saves_again(run, attempt=2)
        agent = children(kept.pid)[0]
        os.kill(agent, signal.SIGKILL)
        saves_again(run, attempt=3)
        kept.send_signal(signal.SIGTERM)
        ends_with(kept, 75)
    with started(log, words) as kept:
        saves_again(run, attempt=4)
        done = snell("stop", run)
        assert done.returncode == 0, done.stderr
        assert "stopped; continue with" in done.stdout
        ends_with(kept, 75)
    with started(log, words) as kept:
        saves_again(run, attempt=5)
        os.killpg(kept.pid, signal.SIGINT)  # as a terminal sends it: to all of them
        ends_with(kept, 75)
    with started(log, words) as kept:
        saves_again(run, attempt=6)
        behind = family(kept.pid)
        kept.kill()
        until(lambda: not any(map(lives, behind)), "the end of what keep had started", 60)
    slow(run).unlink()
    with started(log, words) as kept:
        ends_with(kept, 0)
    assert digest(trained(run)) == digest(trained(undisturbed))
    assert [each.outcome for each in launches(run)] == [
        "failed", "failed", "interrupted", "interrupted", "interrupted", "", "complete",
    ]  # fmt: skip
    assert [each["world_size"] for each in run_folder.attempts(run)] == [2] * 7


@pytest.mark.xdist_group("keep")
def test_a_complete_run_ends_at_once_and_cannot_be_stopped(undisturbed: Path, tmp_path: Path) -> None:
    done = subprocess.run(keeps(undisturbed, FAILS), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, f"snell keep: {undisturbed} is complete\n")
    for folder, said in ((undisturbed, "nothing is training there"), (tmp_path, "is no run folder")):
        done = snell("stop", folder)
        assert done.returncode == 2
        assert said in done.stderr


def test_bad_input_ends_at_once(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    with started(log, keeps(run, torchrun(*slowly(run, "method.rank=18"), restarts=3))) as kept:
        assert kept.wait(timeout=240) == 2
    said = log.read_text().splitlines()
    assert said[-1].startswith("snell keep: not started again, since it would end the same way: ")
    assert "method.rank = 18: is larger than a layer of 16 x 16" in said[-1]
    assert sum(line.startswith("snell: ") for line in said) == 1, "neither keep nor torchrun starts it again"
    assert [each.outcome for each in launches(run)] == ["bad input"]


def test_attempts_without_progress_end_and_say_the_last_cause(tmp_path: Path) -> None:
    lost = {"WORLD_SIZE": "2", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "1"}
    words = keeps(tmp_path, [sys.executable, *slowly(tmp_path)], "--attempts", "2")
    done = subprocess.run(words, env=AROUND | lost, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 76, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("snell keep: 2 attempts in a row ended without a new checkpoint, the last one with: ")
    assert "MASTER_ADDR=no-such-host.invalid: the name is not known" in last
    assert [each.status for each in launches(tmp_path)] == [74, 74]


def test_a_newer_checkpoint_begins_the_count_anew_and_so_does_the_same_command(tmp_path: Path) -> None:
    run, count = tmp_path / "run", tmp_path / "count"
    script = (
        f"echo >> {count}; cd {run}; mkdir -p checkpoints; test $(wc -l < {count}) -gt 3 || date > checkpoints/latest"
    )
    words = keeps(run, ["sh", "-c", f"{script}; exit 3", "--resume-if-any"], "--attempts", "2")
    for starts in (5, 7):
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 76, done.stderr
        assert len(launches(run)) == starts
        assert len(count.read_text().splitlines()) == starts


@pytest.fixture
def slurm(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """What `scontrol` was asked, and the surroundings of job 7; tests/launch has Slurm itself."""
    asked = tmp_path / "asked"
    program = tmp_path / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    program.chmod(0o755)
    return asked, AROUND | {"PATH": f"{program.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def test_attempts_before_a_requeue_count(tmp_path: Path, slurm: tuple[Path, dict[str, str]]) -> None:
    """Of this job, on whichever node, and not of another. After the second failure the queue; the third is the last."""
    asked, environment = slurm
    run = tmp_path / "run"
    run.mkdir()
    earlier = [Launch(f"2026-01-31T1{job}", "node1", job, 0, 0, "failed", 1, "a fault") for job in ("6", "7")]
    (run / LAUNCHES).write_text("".join(f"{json.dumps(asdict(launch))}\n" for launch in earlier))
    for status, said in ((74, "2 times in a row without a new checkpoint: back to the queue"), (76, "giving up")):
        done = subprocess.run(
            keeps(run, FAILS), env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == status, done.stderr
        assert said in done.stderr.splitlines()[-1]
    assert [each.job for each in launches(run)] == ["6", "7", "7", "7"]
    assert asked.read_text() == "requeue 7\n"


def test_near_a_time_limit_the_job_goes_back_to_the_queue(tmp_path: Path, slurm: tuple[Path, dict[str, str]]) -> None:
    asked, environment = slurm
    run, log = tmp_path / "run", tmp_path / "log"
    slow(run).touch()
    with started(log, keeps(run, [sys.executable, *slowly(run, *STEPS)]), **environment) as kept:
        saves_again(run)
        kept.send_signal(signal.SIGUSR1)
        assert kept.wait(timeout=240) == 75
    assert log.read_text().splitlines()[-1] == "snell keep: stopped as asked; back to the queue"
    assert asked.read_text() == "requeue 7\n"


def test_without_slurm_around_it_the_failure_to_requeue_is_said(tmp_path: Path) -> None:
    environment = AROUND | {"PATH": "/nowhere", "SLURM_JOB_ID": "7"}
    words = keeps(tmp_path, ["/bin/sh", *FAILS[1:]], "--attempts", "3")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 76
    assert "scontrol requeue 7: " in done.stderr
    assert "(2 of 3 without a new checkpoint)" in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], check=False).returncode:
        pytest.skip("a small disk needs the right to mount")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_on_a_full_disk_it_goes_on_once_there_is_room(tmp_path: Path, small_disk: Path) -> None:
    run, log = small_disk / "run", tmp_path / "log"
    few = "train.steps=40", "train.save_every=4"
    slow(run).touch()
    with started(log, keeps(run, [sys.executable, *slowly(run, *few)], "--attempts", "9")) as kept:
        saves_again(run)
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as stream:
            while True:
                stream.write(b"0" * 4096)
        until(lambda: "(1 of 9 without a new checkpoint)" in log.read_text(), "a start on a full disk")
        slow(run).unlink()
        ballast.unlink()
        until(lambda: kept.poll() is not None, "the end")
        assert kept.returncode == 0, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said
    assert "MiB are free there); step_" in said, "the disk is named, and what stays"
    assert digest(trained(run)) == digest(trained(train(tmp_path, "method.rank=4", *few).folder))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run"], "keep: no command; say snell keep RUN -- COMMAND"),
        (["run", "--"], "keep: no command"),
        (["run", "--", "snell", "train", "demo"], "keep: snell train demo: must have --resume-if-any"),
        (["run", "--attempts", "0", "--", *FAILS], "keep: --attempts 0: must be at least 1"),
        (["run", "--", "no-such-program", "--resume-if-any"], "keep: no-such-program: cannot be started: No such file"),
        (["file/run", "--", *FAILS], "keep: file/run: cannot be made: not a directory"),
        (["file", "--", *FAILS], "keep: file: cannot be made: file exists"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = snell("keep", *words, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"snell: {said}")


def test_lines_that_a_full_disk_cut_off_are_passed_over(tmp_path: Path) -> None:
    assert launches(tmp_path) == []
    whole = json.dumps(asdict(Launch("now", "here", None, 0, 5, "failed", 1)))
    (tmp_path / LAUNCHES).write_text(f"{whole}\n{whole[:20]}")
    (launch,) = launches(tmp_path)
    assert stalls([launch], saved_at=5) == 1
    assert stalls([launch], saved_at=6) == 0


@pytest.mark.parametrize(("keeper", "asked"), [("another-node", False), (platform.node(), True)])
def test_only_ranks_that_it_started_itself_are_asked_to_stop(keeper: str, asked: bool, tmp_path: Path) -> None:
    """One of two nodes comes back: the other one's ranks go on. What is left of its own start must end first."""
    beats = (
        "import sys, time; from pathlib import Path; from snell_dist.heartbeat import Heart\n"
        f"Heart(Path({str(tmp_path)!r}), 1, 9, 1e9, print); print('beats', flush=True); time.sleep(600)"
    )
    environment = os.environ | {KEPT_BY: keeper}
    environment.pop("SLURM_JOB_ID", None)
    with subprocess.Popen([sys.executable, "-c", beats], env=environment, stdout=subprocess.PIPE, text=True) as rank:
        try:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "beats\n"
            begin = time.time()
            snell("keep", tmp_path, "--attempts", "1", "--grace", "20", "--", *FAILS, env=environment)
            (launch,) = {each.began for each in launches(tmp_path)}
            assert (datetime.fromisoformat(launch).timestamp() - begin > 20) == asked
        finally:
            rank.kill()


def test_a_command_that_outlives_its_ranks_is_ended(tmp_path: Path) -> None:
    """A launcher that waits for a node that is gone: here a shell that sleeps on after its rank was killed."""
    run, log = tmp_path / "run", tmp_path / "log"
    slow(run).parent.mkdir(exist_ok=True)
    slow(run).touch()
    words = shlex.join([sys.executable, *slowly(run, *STEPS)])
    waits = [
        "sh",
        "-c",
        f"test -e {tmp_path}/waited || {{ {words}; touch {tmp_path}/waited; sleep 600; }}; exec {words}",
    ]
    with started(log, keeps(run, [*waits, "--resume-if-any"], "--silence", "4")) as kept:
        saves_again(run)
        os.kill(pid_of(run, 0), signal.SIGKILL)
        slow(run).unlink()
        assert kept.wait(timeout=240) == 0, log.read_text()
    assert "no rank has given a sign of life for 4 s" in log.read_text()
    assert [each.outcome for each in launches(run)] == ["failed", "complete"]
