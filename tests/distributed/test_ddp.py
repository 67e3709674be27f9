"""Real processes under torchrun: the same YAML gives the same numbers on one process and on two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, TINY, train, trained
from ranks import together

# One template, since each rank draws its own; SGD, since AdamW amplifies the rounding of gradients near zero.
PAIRS = ["backbone.templates=['the digit {}']", "optim.name=sgd", "optim.lr=0.05"]


def torchrun(out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "snell_dist", "train", "demo", *TINY, "method.rank=4", *overrides, "--out", str(out)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False)


def together_train(ranks: int, out: Path, config: str, overrides: list[str]) -> Path:
    """As torchrun's ranks would; the run's folder."""
    together(ranks, train_in, out, config, overrides)
    return out / config / "001"


def train_in(out: Path, config: str, overrides: list[str]) -> None:
    train(out, "method.rank=4", *overrides, config=config)


def test_two_processes_equal_one_that_accumulates_bit_for_bit(tmp_path: Path) -> None:
    done = torchrun(tmp_path / "two")
    assert done.returncode == 0, done.stderr
    two = trained(tmp_path / "two" / "demo" / "001")
    one = trained(train(tmp_path / "one", "method.rank=4", "data.micro_batch_size=6").folder)
    assert two.keys() == one.keys()
    assert all(torch.equal(two[name], one[name]) for name in two)
    lines = [line for line in done.stderr.splitlines() if line.startswith("step 6/6")]
    assert len(lines) == 1, "one process speaks"


def test_two_processes_that_accumulate_equal_one(tmp_path: Path) -> None:
    """Sums in another order; SGD, since AdamW amplifies the rounding of gradients near zero."""
    sgd = ["optim.name=sgd", "optim.lr=0.05", "data.micro_batch_size=3"]
    two = trained(together_train(2, tmp_path / "two", "demo", sgd))
    one = trained(train(tmp_path / "one", "method.rank=4", *sgd).folder)
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("processes", [2, 3])
def test_pairs_over_ranks_are_those_of_the_whole_batch(processes: int, tmp_path: Path) -> None:
    """Each rank sees its own rows against all gathered features; micro-batches on top."""
    settings = [*PAIRS, "data.micro_batch_size=2"]
    many = trained(together_train(processes, tmp_path / "many", "clip/digits", settings))
    one = trained(train(tmp_path / "one", "method.rank=4", *PAIRS, config="clip/digits").folder)
    assert many.keys() == one.keys()
    for name, tensor in many.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-5, atol=1e-7)
    summaries = [tmp_path / f"{which}/clip/digits/001/summary.json" for which in ("many", "one")]
    accuracy = [json.loads(file.read_text())["test_accuracy"] for file in summaries]
    assert accuracy[0] == accuracy[1]


def test_a_mistake_under_torchrun_is_said_and_ends_all(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "data.batch_size=13")
    assert done.returncode != 0
    assert (
        "data.batch_size = 13: 2 ranks cannot share it equally (1 left over): 12 or 14 would fit, or 1 ranks"
        in done.stderr
    )
    assert not any(tmp_path.iterdir())
