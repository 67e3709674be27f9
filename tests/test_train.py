"""The main job end to end: it learns, it explains itself, it stops and continues anywhere."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ENVIRONMENT, TINY, command, train, trained, typed
from safetensors.torch import load_file

from snell_dist.build import build
from snell_dist.config import Plugin, UserError, load
from snell_dist.dist import StopRequest
from snell_dist.job import _as_begun, run
from snell_dist.log import MetricsFile
from snell_dist.run_config import Run
from snell_dist.run_folder import STOP, attempts
from snell_dist.tensor_files import read_tensors
from snell_dist.train import Outcome
from snell_dist.train import train as train_built


def equal(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("method", Plugin("methods").names())
def test_interrupted_and_resumed_is_bit_equal_to_uninterrupted(method: str, tmp_path: Path) -> None:
    """Dropout and stochastic depth are on: randomness must continue, too."""
    options = ["backbone.drop_path=0.3", f"method.name={method}"]
    fields = Plugin("methods").find(method).model_fields
    options += [f"method.{key}={value}" for key, value in {"dropout": 0.2, "rank": 4}.items() if key in fields]
    whole = train(tmp_path / "whole", *options)
    parts = tmp_path / "parts"
    first = train(parts, *options)
    assert first.folder is not None
    # Back to the state that a crash after step 4 leaves: later files do not exist yet.
    for name in ("summary.json", "adapter.safetensors"):
        (first.folder / name).unlink()
    for file in (first.folder / "checkpoints" / "step_00000006").iterdir():
        file.unlink()
    (first.folder / "checkpoints" / "step_00000006").rmdir()
    second = train(parts, *options, resume=True)
    assert second.folder == first.folder
    assert equal(trained(second.folder), trained(whole.folder))
    assert second.summary["test_accuracy"] == whole.summary["test_accuracy"]
    steps = [json.loads(line)["step"] for line in (second.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 3, 5], "a resumed run does not repeat lines"


LONG = [*TINY, "train.steps=60", "train.save_every=3", "method.rank=4"]


def test_kill_9_at_a_random_moment_then_resume_is_bit_equal(tmp_path: Path) -> None:
    whole = typed("train", "demo", *LONG, "--folder", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    rng, folder, kills = random.Random(), tmp_path / "killed", 0
    while not (folder / "summary.json").exists():
        resume = ["--resume"] if folder.exists() else []
        process = subprocess.Popen(
            command("train", "demo", *LONG, "--folder", folder, *resume),
            env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if kills < 2:
            wait_for(folder / "run.json", process)
            time.sleep(rng.uniform(0, 1.5))
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, said = process.communicate(timeout=300)
        assert process.returncode in (0, -signal.SIGKILL), said
    assert kills > 0
    assert equal(trained(folder), trained(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave_a_resumable_run(number: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = [*LONG, "train.steps=100000", "train.save_every=100000"]
    process = subprocess.Popen(
        command("train", "demo", *steps, "--folder", folder), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_for(folder / "metrics.jsonl", process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "Traceback" not in said
    assert f"--resume --folder {folder}" in said.splitlines()[-1]
    (saved,) = (folder / "checkpoints").glob("step_*")
    done = int(saved.name.removeprefix("step_"))
    assert done > 0
    assert not (folder / "summary.json").exists()


def test_only_a_second_ctrl_c_stops_at_once() -> None:
    """Ctrl-C reaches a whole group, and a parent that passes it on as SIGTERM may be the faster."""
    with StopRequest().listening() as request:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert request.received is not None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_folder_explains_itself(tmp_path: Path) -> None:
    outcome = train(tmp_path, "method.rank=4")
    folder = outcome.folder
    assert folder == tmp_path / "demo" / "001"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["method"]["rank"], config["train"]["seed"], config["engine"]["name"]) == (4, 0, "ddp")
    (attempt,) = json.loads((folder / "run.json").read_text())
    assert attempt["versions"]["torch"] == torch.__version__.partition("+")[0] or attempt["versions"]["torch"]
    assert {"command", "git", "seed", "device", "host", "started"} <= attempt.keys()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trainable_parameters"] == sum(t.numel() for t in trained(folder).values())
    assert summary["peak_memory_mib"] > 0
    assert (folder / "train.log").read_text().count("\n") > 3
    again = train(tmp_path, "method.rank=4")
    assert again.folder == tmp_path / "demo" / "002", "a second run gets its own folder"
    assert equal(trained(again.folder), trained(folder)), "the same seed gives the same run"
    other = train(tmp_path, "method.rank=4", "train.seed=1")
    assert not equal(trained(other.folder), trained(folder))


def test_resume_refuses_another_runs_folder_and_finished_runs_stay(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    train(tmp_path, "method.rank=4", folder=folder)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"another configuration \(they differ in method.rank\)"):
        train(tmp_path, "method.rank=2", folder=folder, resume=True)
    with pytest.raises(UserError, match="exists; continue there with --resume"):
        train(tmp_path, "method.rank=4", folder=folder)
    with pytest.raises(UserError, match="has no run of this configuration"):
        train(tmp_path, "method.rank=2", resume=True)
    with pytest.raises(UserError, match="no such run folder"):
        train(tmp_path, folder=tmp_path / "none", resume=True)
    assert train(tmp_path, "method.rank=4", folder=folder, resume=True).summary["steps"] == 6
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_resume_if_any_begins_and_continues_by_the_same_command(tmp_path: Path, monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    """With a stop file in between, which asks any run under any launcher to save and stop."""
    monkeypatch.setattr("snell_dist.dist.STOP_CHECK_S", 0.0)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".launches.jsonl").touch()  # of whoever starts it

    def again() -> Outcome:
        return train(tmp_path, "method.rank=4", resume="if any", folder=folder)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_step", lambda self, moment: (folder / STOP).touch())
        assert again().interrupted
    assert again().summary["steps"] == 6
    assert "resumed after step 2 of 6" in caplog.text
    assert equal(trained(folder), trained(train(tmp_path / "alone", "method.rank=4").folder))
    assert again().folder == folder
    assert f"{folder} is complete, nothing to do" in caplog.text
    assert len(attempts(folder)) == 2
    with pytest.raises(UserError, match=r"another configuration \(they differ in method.rank\)"):
        train(tmp_path, "method.rank=8", resume="if any", folder=folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(UserError, match="not a run folder"):
        train(tmp_path, "method.rank=4", resume="if any", folder=tmp_path / "other")
    found = [train(tmp_path / "out", "method.rank=4", resume="if any").folder for _ in range(2)]
    assert found == [tmp_path / "out/demo/001"] * 2


def test_a_run_killed_between_its_last_step_and_its_summary_completes(tmp_path: Path) -> None:
    whole = train(tmp_path, "method.rank=4")
    for name in ("summary.json", "adapter.safetensors"):
        (whole.folder / name).rename(tmp_path / name)
    again = train(tmp_path, "method.rank=4", resume=True)
    assert again.summary["test_accuracy"] == whole.summary["test_accuracy"]
    assert equal(trained(again.folder), load_file(tmp_path / "adapter.safetensors"))


def test_the_base_is_trained_first_and_once(tmp_path: Path) -> None:
    """`weights: config:NAME` on the demo itself, with its base made small."""
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(load("demo/pretrain", TINY, Run).config.model_dump()))
    overrides = [*TINY, f"backbone.weights=config:{base}"]
    first = run(load("demo/linear", overrides, Run), tmp_path)
    second = run(load("demo/linear", overrides, Run), tmp_path)
    assert [p.name for p in (tmp_path / "base").glob("[!.]*")] == ["001"]
    assert first.summary["base_sha256"] == second.summary["base_sha256"]
    weights = trained(tmp_path / "base" / "001")
    assert first.summary["base_weights"] == str(tmp_path / "base" / "001" / "adapter.safetensors")
    assert weights.keys() == read_tensors(Path(first.summary["base_weights"])).keys()


def test_a_base_that_was_interrupted_continues_when_the_command_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = load("demo/pretrain", [*TINY, "train.steps=300", "train.save_every=300"], Run).config.model_dump()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    arguments = ["train", "demo/linear", *TINY, "backbone.weights=config:base.yaml"]
    process = subprocess.Popen(command(*arguments), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "runs/base/001/metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "--resume" not in said.splitlines()[-1]
    again = typed(*arguments)
    assert again.returncode == 0, again.stderr
    assert "resumed after step" in again.stderr
    assert [p.name for p in (tmp_path / "runs/base").glob("[!.]*")] == ["001"]


def test_what_is_frozen_stays_as_it_was(tmp_path: Path) -> None:
    config = load("demo", [*TINY, "method.rank=4"], Run).config
    built = build(config, None, torch.device("cpu"))
    before = {name: p.clone() for name, p in built.engine.model.named_parameters()}
    train_built(config, tmp_path, built, torch.device("cpu"))
    changed = {name for name, p in built.engine.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(built.trainable)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lower optim\.lr|not finite"):
        train(tmp_path, "method.name=full", "optim.name=sgd", "optim.lr=1e30", "optim.warmup_steps=0")


def test_checkpointing_blocks_changes_no_bit(tmp_path: Path) -> None:
    options = ["method.rank=4", "backbone.drop_path=0.3", "method.dropout=0.2"]
    plain = train(tmp_path, *options)
    remat = train(tmp_path, *options, "remat.policy=block")
    assert equal(trained(plain.folder), trained(remat.folder))
    assert remat.summary["peak_memory_mib"] < plain.summary["peak_memory_mib"]


def wait_for(file: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not (file.exists() and file.stat().st_size):
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < end
        time.sleep(0.02)


def test_on_fewer_ranks_micro_batches_stay_as_large_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks began with 6 images each of a batch of 12: one goes on with 2 micro-batches of 6, four with 3 each."""
    (tmp_path / "run.json").write_text(json.dumps([{"micro_batch_size": 6}]))
    config = load("demo", TINY, Run).config
    for world_size, micro in ((1, 6), (2, None), (4, None)):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        assert _as_begun(config, tmp_path).data.micro_batch_size == micro
    said = load("demo", [*TINY, "data.micro_batch_size=4"], Run).config
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert _as_begun(said, tmp_path).data.micro_batch_size == 4
