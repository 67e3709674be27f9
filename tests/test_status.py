"""How a run is and what it said, from its folder alone: complete, at work, stopped, dead."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command, snell, train
from disturbed import pid_of, slow, slowly, started, until

from snell_dist import log, run_folder, status
from snell_dist.heartbeat import Heart

HEAD = ["attempt", "started", "ranks", "hosts", "job"]


@pytest.mark.timeout(900)
def test_a_real_run_trains_stops_dies_and_completes(tmp_path: Path) -> None:
    """Its log is followed by another process, which ends with it."""
    run, said, followed = tmp_path / "run", tmp_path / "said", tmp_path / "followed"
    words = [sys.executable, *slowly(run, "train.steps=60", "train.save_every=4")]
    slow(run).touch()

    def look() -> dict:
        done = snell("status", "--json", run)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with started(said, words) as training:
        until(lambda: run_folder.saved_at(run), "a checkpoint")
        with started(followed, command("logs", "--follow", run)) as follower:
            seen = look()
            assert seen["state"] == "training"
            assert seen["step"] >= 4 and seen["steps"] == 60
            assert seen["loss"] > 0 and seen["images_per_s"] > 0 and seen["left_s"] > 0
            assert seen["checkpoint"] >= 4 and seen["checkpoint_age_s"] < 240
            assert [beat["pid"] for beat in seen["ranks"]] == [pid_of(run, 0)]
            text = snell("status", run).stdout
            assert f"{run}: training, step " in text
            assert " of 60\n" in text and " left" in text and "checkpoint after step " in text
            assert [line.split() for line in text.splitlines() if line.startswith("attempt")] == [HEAD]
            training.send_signal(signal.SIGTERM)
            assert training.wait(timeout=240) == 75, said.read_text()
            assert look()["state"] == "stopped"
            with started(said, words) as again:
                before = run_folder.saved_at(run)
                until(lambda: run_folder.saved_at(run) > before, "a newer checkpoint")
                again.kill()
                again.wait()
            assert look()["state"] == "dead"
            slow(run).unlink()
            assert follower.poll() is None
            with started(said, words) as last:
                assert last.wait(timeout=240) == 0, said.read_text()
            until(lambda: follower.poll() is not None, "the end of who follows")
            assert follower.returncode == 0
    seen = look()
    assert (seen["state"], seen["step"], len(seen["attempts"])) == ("complete", 60, 3)
    assert seen["summary"]["test_accuracy"] > 0
    assert "test accuracy 0." in snell("status", run).stdout
    assert followed.read_text() == snell("logs", run).stdout
    assert followed.read_text().count("resumed after step") == 2
    assert " [rank 0] step 60/60  loss " in followed.read_text()


def test_launches_and_their_ends_are_shown(tmp_path: Path) -> None:
    folder = train(tmp_path, "method.rank=4").folder
    assert folder is not None
    launch = {"began": "2026-01-31T12:00:00", "host": "node1", "job": "7", "restarts": 0, "saved_at": 0}
    ended = launch | {"outcome": "failed", "status": 74, "why": "node2: no space left"}
    (folder / ".launches.jsonl").write_text(f"{json.dumps(launch)}\n{json.dumps(ended)}\n")
    text = status.text(status.look(folder))
    assert "2026-01-31T12:00:00  on node1 failed: node2: no space left" in text
    assert "complete, step 6 of 6" in text.splitlines()[0]


def test_one_rank_of_two_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    hearts = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        hearts.append(Heart(tmp_path, 1, 9, 600, lambda folder, stuck_s: None))
        hearts[-1].enter("data", 3)
    hearts[1].stop("a fault")
    found = status.look(tmp_path)
    assert found.state == "training"
    assert "ended in the dataloader at step 3: a fault" in found.notes[0]
    hearts[0].stop("well")
    found = status.look(tmp_path)
    assert found.state == "dead"
    assert "rank 1 on " in found.notes[0] and found.notes[0].endswith(" ended: a fault")
    assert "  no checkpoint yet" in status.text(found).splitlines()


def write(folder: Path, rank: int, *lines: str) -> None:
    file = folder / log.FILE if rank == 0 else folder / log.OTHERS / f"rank_{rank:05d}.log"
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def test_logs_are_in_the_order_of_time_and_whole(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    day = "2026-01-31 12:00"
    write(tmp_path, 0, f"{day}:01,000 [rank 0] one", f"{day}:03,000 [rank 0] three", "  and more", "")
    write(tmp_path, 12, f"{day}:02,000 [rank 12] two", f"{day}:04,000 [rank 12] four")
    shown = [line.partition("] ")[2] for line in status.lines(tmp_path, None, follow=False)]
    assert shown == ["one", "two", "three\n  and more\n", "four"]
    done = snell("logs", "--rank", "12", tmp_path)
    assert done.stdout == f"{day}:02,000 [rank 12] two\n{day}:04,000 [rank 12] four\n"
    assert list(status.lines(tmp_path, 1, follow=False)) == []


def test_the_traceback_of_what_ends_a_rank_is_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ZeroDivisionError), log.also_to(tmp_path):
        logging.getLogger("snell_dist").warning("before")
        1 / 0  # noqa: B018
    before, after = status.lines(tmp_path, 3, follow=False)
    assert before.endswith("[rank 3] before")
    assert "[rank 3] Traceback (most recent call last):\n" in after
    assert after.endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize(
    "words", [["status"], ["status", "--json"], ["logs"], ["logs", "--follow"], ["doctor", "hang"]]
)
def test_what_is_no_run_folder_is_one_line(words: list[str], tmp_path: Path) -> None:
    done = subprocess.run(command(*words, tmp_path), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"snell: {tmp_path}: is no run folder (it has no config.yaml)\n"
