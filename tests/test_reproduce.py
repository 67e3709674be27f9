"""`snell reproduce` on miniature data in the true layouts: to a table, killed and resumed to the same table."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, command, snell, typed
from mini_layouts import write_fgvc, write_vtab

from snell_dist.cli import main

SMALL = [
    "backbone.weights=null", "backbone.width=32", "backbone.depth=2", "backbone.heads=2", "backbone.image_size=32",
    "backbone.patch_size=8", "data.image_size=32", "data.batch_size=20", "data.workers=0", "train.device=cpu",
    "train.epochs=4", "train.log_every=2", "train.save_every=2",
]  # fmt: skip
FGVC = ["fgvc", "--tasks", "cub", "stanfordcar", "--methods", "snell8", "snella32", "linear", "--seeds", "1"]
VTAB = ["vtab", "--tasks", "cifar", "svhn", "--methods", "snell8", "lora", "--seeds", "2"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_vtab(tmp_path / "data" / "vtab-1k", ["cifar", "svhn", "dtd"])
    write_fgvc(tmp_path / "data" / "fgvc", ["cub", "stanfordcar"])
    return tmp_path / "data"


def arguments(what: list[str], data: Path, out: Path, *more: str) -> list[str]:
    return ["reproduce", *what, "--data", str(data), "--out", str(out), *SMALL, *more]


def accuracies(out: Path, benchmark: str) -> dict[tuple[str, str, int], float]:
    results = json.loads((out / benchmark / "table.json").read_text())
    return {(r["method"], r["task"], r["seed"]): r["summary"]["test_accuracy"] for r in results if r["summary"]}


def done(out: Path) -> int:
    """Complete runs; looks into no checkpoints, which come and go meanwhile."""
    return len(list(out.glob("*/*/*/seed*/summary.json")))


@pytest.mark.parametrize(("what", "runs"), [(VTAB, 8), (FGVC, 6)])
def test_killed_at_random_and_resumed_gives_the_same_table(
    what: list[str], runs: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed = typed(*arguments(what, data, tmp_path / "whole"))
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert len(accuracies(tmp_path / "whole", what[0])) == runs
    draw = random.Random(what[0])
    for _ in range(3):
        process = subprocess.Popen(
            command(*arguments(what, data, tmp_path / "parts")),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        begin, cells = time.monotonic(), done(tmp_path / "parts")
        while process.poll() is None and time.monotonic() < begin + 120:  # past the start, into some run
            if done(tmp_path / "parts") > cells + 1:
                time.sleep(draw.uniform(0, 0.5))
                break
            time.sleep(0.02)
        process.kill()
        process.wait()
    resumed = snell(*arguments(what, data, tmp_path / "parts"))
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == undisturbed.stdout
    assert accuracies(tmp_path / "parts", what[0]) == accuracies(tmp_path / "whole", what[0])
    assert resumed.stdout == (tmp_path / "parts" / what[0] / "table.md").read_text()
    for more in ([], ["--table"]):
        assert main(arguments(what, data, tmp_path / "parts", *more)) == 0
        again = capsys.readouterr()
        assert again.out == undisturbed.stdout
        assert "run folder" not in again.err, "what is done is not done again"


def test_sigterm_saves_and_says_how_to_go_on(data: Path, tmp_path: Path) -> None:
    said = arguments(
        VTAB, data, tmp_path / "out", "train.epochs=4000", "train.eval_epochs=1000", "train.eval_last_epochs=0"
    )
    process = subprocess.Popen(
        command(*said), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert err.splitlines()[-1].startswith(
        "interrupted and saved; continue with: snell reproduce vtab --tasks cifar svhn"
    )
    assert "0 of 8 runs are done" in out


def test_processes_and_shares_divide_the_work(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once by --jobs, and a Slurm job array's two tasks: each cell is trained once."""
    jobs = snell(*arguments(VTAB, data, tmp_path / "jobs", "--jobs", "2"))
    assert jobs.returncode == 0, jobs.stderr
    for task in ("3", "5"):
        array = {"ID": task, "MIN": "3", "MAX": "5", "STEP": "2", "COUNT": "2"}
        for key, value in array.items():
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
        done = typed(*arguments(VTAB, data, tmp_path / "array"))
        assert done.returncode == 0, done.stderr
        assert f"{4 if task == '3' else 8} of 8 runs are done" in done.stdout
    assert accuracies(tmp_path / "jobs", "vtab") == accuracies(tmp_path / "array", "vtab")
    for out in ("jobs", "array"):
        starts = [json.loads(file.read_text()) for file in (tmp_path / out).rglob("run.json")]
        assert [len(attempts) for attempts in starts] == [1] * 8


def test_paper_compat_is_marked(data: Path, tmp_path: Path) -> None:
    what = ["vtab", "--tasks", "svhn", "--methods", "lora", "--seeds", "1"]
    done = typed(*arguments(what, data, tmp_path / "out", "protocol.select=paper_compat"))
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| svhn"))
    assert row.endswith("† |")
    assert (
        "†The best of several looks at the TEST images, as the released code does; learned from train and val"
        in done.stdout
    )


def test_a_run_that_fails_is_told_and_the_others_go_on(data: Path, tmp_path: Path) -> None:
    """Rank 64 does not fit layers of width 32; the linear probe has none."""
    what = ["vtab", "--tasks", "svhn", "--methods", "lora", "snell8", "--seeds", "1"]
    (data / "vtab-1k/svhn/images/test/0005.png").write_bytes(b"")  # of train800, seen in training only
    done = typed(*arguments(what, data, tmp_path / "out"))
    assert done.returncode == 2
    assert "0005.png: is empty" in done.stdout
    assert "Failed: lora on svhn seed 0, snell8 on svhn seed 0: " in done.stdout
    write_vtab(tmp_path / "good", ["svhn"])
    (data / "vtab-1k/svhn/images/test/0005.png").write_bytes((tmp_path / "good/svhn/images/test/0005.png").read_bytes())
    mended = typed(*arguments(what, data, tmp_path / "out"))
    assert mended.returncode == 0, mended.stderr
    assert "Failed" not in mended.stdout


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (["vtap"], ["reproduce: 'vtap': no such benchmark, did you mean 'vtab'?"]),
        (["vtab", "--tasks", "cifer", "svhm"], ["--tasks cifer: unknown, did you mean 'cifar'?", "--tasks svhm: unkn"]),
        (["vtab", "--methods", "snell-8"], ["--methods snell-8: unknown, did you mean 'snell8'?"]),
        (["vtab", "--tasks", "svhn", "kitti", "sun397"], ["kitti: data.root", "sun397: data.root"]),
        (["vtab", "--tasks", "kitti", "--methods", "snella32"], ["none of snella32 has a configuration for kitti"]),
        (["vtab", "--share", "3/2"], ["--share 3/2: expected I/N"]),
        (["vtab", "train.seed=4"], ["reproduce: train.seed=4: train.seed differs from run to run; say --seeds"]),
        (["vtab", "data.dataset=svhn"], ["data.dataset differs from run to run; say --tasks"]),
        (["vtab", "--methods", "lora", "optim.lr=-1"], ["command line: optim.lr = -1: must be greater than 0"]),
        (["vtab", "--seeds", "0"], ["--seeds 0"]),
    ],
)  # fmt: skip
def test_bad_input_is_said_before_any_training(
    what: list[str], said: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(what, data, tmp_path / "out")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said), lines
    assert all(expected in line for expected, line in zip(said, lines, strict=True))
    assert not list(tmp_path.glob("out/**/config.yaml"))


def test_missing_weights_are_said_once_and_before_any_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = ["vtab", "--tasks", "svhn", "cifar", "--jobs", "2"]
    assert main(arguments(what, data, tmp_path / "out", "backbone.weights=ViT.npz")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("snell: backbone.weights = 'ViT.npz': no such file or folder; name another, or ")
    assert not (tmp_path / "out").exists()


def test_an_array_with_gaps_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--array=1,3,7, as after a failure: nobody would have the shares between."""
    for key, value in {"ID": "3", "MIN": "1", "MAX": "7", "STEP": "1", "COUNT": "3"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    assert main(arguments(VTAB, data, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert "SLURM_ARRAY_TASK_ID = 3: the array has gaps (3 tasks from 1 to 7)" in said
    assert "submit --array=0-2, or say --share I/N" in said


def test_ctrl_c_saves_every_process(data: Path, tmp_path: Path) -> None:
    """As a terminal sends it, to the whole group; the parent passes it on besides."""
    long = ["train.epochs=4000", "train.eval_epochs=1000", "train.eval_last_epochs=0", "train.save_every=100000"]
    what = ["vtab", "--tasks", "cifar", "svhn", "--methods", "lora", "--seeds", "1", "--jobs", "2"]
    process = subprocess.Popen(
        command(*arguments(what, data, tmp_path / "out", *long)),
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    folders = [tmp_path / "out/vtab/lora" / task / "seed0" for task in ("cifar", "svhn")]
    until = time.monotonic() + 200
    while not all((f / "metrics.jsonl").exists() and (f / "metrics.jsonl").stat().st_size for f in folders):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert err.splitlines()[-1].startswith("interrupted and saved; continue with: snell reproduce vtab")
    assert all(list(folder.glob("checkpoints/step_*")) for folder in folders)


def test_another_configuration_in_the_same_folder_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = ["vtab", "--tasks", "svhn", "--methods", "linear", "--seeds", "1"]
    assert main(arguments(what, data, tmp_path / "out")) == 0
    assert main(arguments(what, data, tmp_path / "out", "optim.lr=0.5")) == 2
    assert "was made by another configuration (they differ in optim.lr)" in capsys.readouterr().err
