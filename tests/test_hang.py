"""Who keeps the others: the sentence for every situation, and real ranks and readers that stand still."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import digest, snell, train, trained
from disturbed import children, keeps, lives, pid_of, slow, slowly, started, torchrun, until

from snell_dist import hang, run_folder
from snell_dist.hang import diagnose
from snell_dist.heartbeat import Beat

REDUCES = "the reduction of gradients"
WAITS = Beat(0, 2, "node1", 100, 1, step=41, steps=90, phase="backward", phase_s=60.2, waits_in=REDUCES)
READS = replace(WAITS, rank=1, host="node2", phase="data", phase_s=60.4, waits_in="", doing="step, feed.py:70")
DATA = "the dataloader at step 41"
OTHER = f"rank 0 on node1 waits in {REDUCES} at step 41"
GONE = "its process was killed or stopped, or its node or link is gone"
ALL = f"all ranks wait in {REDUCES} at step 41 since 60 s: the network"


@pytest.mark.parametrize(
    ("beats", "said"),
    [
        ([], []),
        ([WAITS, READS], [f"rank 1 on node2 stopped in {DATA} 60 s ago (step, feed.py:70); {OTHER}"]),
        (
            [WAITS, replace(READS, silent_s=9.0)],
            [f"rank 1 on node2 gives no sign of life since 9 s (then in {DATA}): {GONE}; {OTHER}"],
        ),
        (
            [WAITS, replace(READS, ended="no space left")],
            [f"rank 1 on node2 ended in {DATA}: no space left; {OTHER}"],
        ),
        ([WAITS, replace(WAITS, rank=1, host="node2")], [f"{ALL} between node1, node2 has failed"]),
        ([WAITS, replace(WAITS, rank=1)], [f"{ALL} of node1 has failed"]),
        (
            [WAITS, replace(WAITS, rank=1, host="node2", phase="agree", waits_in="all_reduce")],
            [
                f"no rank is at work, and they wait in {REDUCES} at step 41 (rank 0 on node1) and in all_reduce at"
                " step 41 (rank 1 on node2): the network between node1, node2 has failed, or they went different ways"
            ],
        ),
        (
            [replace(WAITS, world_size=3), replace(WAITS, rank=2, world_size=3)],
            [f"rank 1 never began (1 of 3); the others wait in {REDUCES} at step 41"],
        ),
        (
            [WAITS, replace(WAITS, rank=1, waits_in="", doing="hook, engines/ddp.py:9")],
            [f"rank 1 on node1 stopped in the backward pass at step 41 60 s ago (hook, engines/ddp.py:9); {OTHER}"],
        ),
    ],
    ids=["nobody", "data", "silent", "ended", "network", "one host", "two phases", "missing", "same phase"],
)
def test_the_sentence_names_the_cause(beats: list[Beat], said: list[str]) -> None:
    assert diagnose(beats) == said


@pytest.mark.parametrize("change", [{"silent_s": 9.0}, {"ended": "a fault"}, {"phase": "data", "waits_in": ""}])
def test_of_a_thousand_ranks_few_are_named(change: dict[str, object]) -> None:
    beats = [replace(WAITS, rank=rank, world_size=1000) for rank in range(1000)]
    beats[300:600] = [replace(beat, **change) for beat in beats[300:600]]
    said = diagnose(beats)
    assert len(said) == hang.SHOWN
    assert len("; ".join(said)) < 1000
    assert "; ".join(diagnose(beats[:100])).startswith("rank 100, 101, 102, 103 never began (900 of 1000)")


@pytest.mark.timeout(1200)
def test_what_stands_still_is_named_ended_and_goes_on(tmp_path: Path) -> None:
    """A reader of rank 1 is stopped, without and then, with the whole rank, under `snell keep`."""
    run, log = tmp_path / "run", tmp_path / "log"
    words = slowly(run, "train.steps=40", "train.save_every=4", "data.workers=1", "train.hang_timeout_s=12")
    slow(run).touch()
    sentence = f"rank 1 on {os.uname().nodename} stopped in the dataloader at step "
    with started(log, torchrun(*words)) as launcher:
        until(lambda: run_folder.saved_at(run), "a checkpoint")
        readers = children(pid_of(run, 1))
        os.kill(readers[-1], signal.SIGSTOP)
        until(lambda: "stopped in the dataloader" in " ".join(hang.report(run)), "the rank that keeps the other")
        assert launcher.poll() is None, "seen while it lasts"
        said = snell("doctor", "hang", run).stdout
        until(lambda: launcher.poll() is not None, "the end")
    assert sentence in said
    assert "waits in the reduction of gradients" in said
    lines = [line for line in log.read_text().splitlines() if "no progress for" in line]
    assert len(lines) == 1 and "(train.hang_timeout_s): " + sentence in lines[0], log.read_text()
    assert "exitcode  : 77" in log.read_text()
    until(lambda: not any(map(lives, readers)), "the end of the readers", 60)
    told = snell("doctor", "hang", run).stdout
    assert f"a watchdog ended attempt 1: {sentence}" in told
    assert "rank 0: " in told, "the last collective operation"
    status = json.loads(snell("status", "--json", run).stdout)
    assert status["state"] == "dead"
    assert sentence in status["notes"][0]
    with started(log, keeps(run, torchrun(*words))) as kept:
        until(lambda: len(run_folder.attempts(run)) == 2, "the second attempt")
        before = run_folder.saved_at(run)
        until(lambda: run_folder.saved_at(run) > before, "a newer checkpoint")
        os.kill(pid_of(run, 1), signal.SIGSTOP)
        until(lambda: len(run_folder.attempts(run)) == 3, f"the third attempt\n{log.read_text()}")
        slow(run).unlink()
        until(lambda: kept.poll() is not None, f"the end\n{log.read_text()}")
    assert kept.returncode == 0, log.read_text()
    assert "rank 1 on " in (run / "heartbeat/hang_0002.txt").read_text()
    assert "gives no sign of life" in (run / "heartbeat/hang_0002.txt").read_text()
    alone = train(
        tmp_path / "alone", "method.rank=4", "data.micro_batch_size=6", "train.steps=40", "train.save_every=4"
    )
    assert digest(trained(run)) == digest(trained(alone.folder))


def test_of_a_folder_without_heartbeats_it_is_said(tmp_path: Path) -> None:
    done = snell("doctor", "hang", tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    (tmp_path / "config.yaml").touch()
    done = snell("doctor", "hang", tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"snell: doctor hang: {tmp_path}: no rank has left a heartbeat there\n"
