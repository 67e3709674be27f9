"""What a rank leaves in its file while it works, and what is read from the files of all."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from snell_dist import heartbeat
from snell_dist.heartbeat import Beat, Heart, beating, enter, read, straggler

BEAT = Beat(0, 2, "node1", 100, 1, step=6, steps=9, phase="data", phase_s=0.1, timed_steps=4)


def never(folder: Path, stuck_s: float) -> None:
    raise AssertionError(f"stuck for {stuck_s} s")


def test_where_no_heart_beats_nothing_happens() -> None:
    enter("data", 1)


def test_it_says_where_the_rank_is_and_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PERIOD_S", 0.02)
    with pytest.raises(RuntimeError, match="a fault"), beating(tmp_path, 3, 9, 600, never):
        for step in (1, 2, 3, 4):
            enter("data", step)
            enter("forward")
        end = time.monotonic() + 60
        while read(tmp_path)[0].step < 4 and time.monotonic() < end:
            time.sleep(0.01)
        (beat,) = read(tmp_path)
        assert (beat.attempt, beat.step, beat.steps, beat.phase, beat.ended) == (3, 4, 9, "forward", "")
        assert beat.pid == os.getpid()
        assert beat.timed_steps == 2, "the first step is not counted, and the fourth is still at work"
        assert beat.seconds.keys() <= {"data", "forward"}
        raise RuntimeError("a fault\nof many lines")
    assert [beat.ended for beat in read(tmp_path)] == ["a fault"]
    with beating(tmp_path, 4, 9, 600, never):
        pass
    assert [(beat.attempt, beat.ended) for beat in read(tmp_path)] == [(4, "well")]


def test_a_phase_beyond_the_limit_is_told_and_the_start_may_take_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "PERIOD_S", 0.01)
    found: list[float] = []
    heart = Heart(tmp_path, 1, 9, 0.5, lambda folder, stuck_s: found.append(stuck_s))
    end = time.monotonic() + 60
    while not found and time.monotonic() < end:
        time.sleep(0.01)
    assert found[0] > 1.5
    found.clear()
    heart.enter("data", 1)
    while not found and time.monotonic() < end:
        time.sleep(0.01)
    heart.stop("well")
    assert found[0] > 0.5


def test_only_the_newest_attempt_is_read_and_torn_files_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read(tmp_path) == []
    for rank, attempt in ((0, 2), (1, 2), (2, 1)):  # the third rank is of a larger group before
        monkeypatch.setenv("RANK", str(rank))
        Heart(tmp_path, attempt, 9, 600, never).stop("well")
    files = sorted((tmp_path / "heartbeat").iterdir())
    now = time.time()
    os.utime(files[0], (now - 30, now - 30))
    os.utime(files[1], (now - 10, now - 10))
    os.utime(files[2], (now - 50, now - 50))
    first, second = read(tmp_path)
    assert (first.rank, second.rank) == (0, 1)
    assert (round(first.silent_s), round(second.silent_s)) == (20, 0)
    assert first.age_s >= 30
    files[0].write_bytes(b"")
    assert [beat.rank for beat in read(tmp_path)] == [1]
    files[1].write_bytes(files[1].read_bytes()[:100])
    assert [beat.attempt for beat in read(tmp_path)] == [1]


def test_a_straggler_is_who_spends_longer_than_the_median_by_a_tenth_of_a_step() -> None:
    def spends(rank: int, data: float, forward: float = 0.4) -> Beat:
        return replace(BEAT, rank=rank, seconds={"data": data, "forward": forward, "backward": 4.0 - data - forward})

    assert straggler([]) is None
    assert straggler([spends(0, 0.4), replace(spends(1, 3.0), timed_steps=0)]) is None, "no step is timed yet"
    assert straggler([spends(0, 0.4), spends(1, 0.7), spends(2, 0.4)]) is None
    said = straggler([spends(0, 0.4), spends(1, 2.4), spends(2, 0.4), spends(3, 0.4, forward=1.0)])
    assert said == "rank 1 on node1 spends 0.600 s a step in the dataloader, the median 0.100 s: others wait"
