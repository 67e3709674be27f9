"""What the tests share: small settings, and processes started the way a user starts them."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from snell_dist.adapter import ADAPTER
from snell_dist.checkpoint import Checkpoint, Checkpoints, Meta, newest
from snell_dist.cli import main
from snell_dist.config import load
from snell_dist.job import run
from snell_dist.run_config import Run
from snell_dist.run_folder import Resume
from snell_dist.train import Outcome

pytest_plugins = ["cluster"]  # in tests/launch: machines, Slurm and ssh


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What may take longest begins first, so that no worker ends alone with it; groups keep their order."""

    def group(item: pytest.Item) -> str:
        mark = item.get_closest_marker("xdist_group")
        return mark.args[0] if mark else item.nodeid

    longest: dict[str, float] = {}
    for item in items:
        allowed = max((mark.args[0] for mark in item.iter_markers("timeout")), default=0)
        longest[group(item)] = max(longest.get(group(item), 0), allowed)
    items.sort(key=lambda item: -longest[group(item)])


# Small enough for a second on one core; everything else as in configs/demo.yaml.
TINY = [
    "backbone.weights=null",
    "backbone.width=16",
    "backbone.depth=2",
    "backbone.heads=2",
    "data.batch_size=12",
    "train.steps=6",
    "train.log_every=2",
    "train.eval_every=null",
    "train.save_every=2",
    "train.device=cpu",
]
ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def train(
    out: Path, *overrides: str, config: str = "demo", resume: Resume = False, folder: Path | None = None
) -> Outcome:
    """A tiny run in this process."""
    return run(load(config, [*TINY, *overrides], Run), out, resume, folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete tiny SNELL run on digits, whose base is a file."""
    out = tmp_path_factory.mktemp("finished")
    base = train(out, config="demo/pretrain").folder
    assert base is not None
    place = train(out, f"backbone.weights={base / ADAPTER}", "train.steps=4").folder
    assert place is not None
    return place


@pytest.fixture(scope="session")
def finished_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete tiny run that tuned both towers of a random CLIP."""
    shape = ["image_size=32", "patch_size=8", "features=16", "text_width=16", "text_depth=1", "text_heads=2"]
    said = [*(f"backbone.{word}" for word in shape), "data.image_size=32", "train.steps=2"]
    place = train(tmp_path_factory.mktemp("finished_clip"), *said, config="clip/digits").folder
    assert place is not None
    return place


def snell(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=300, **({"env": ENVIRONMENT} | options)
    )


def typed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has imported what it needs."""
    words, out, err = list(map(str, arguments)), io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(words)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "snell_dist", *map(str, arguments)]


def trained(folder: Path | None) -> dict:
    """The tensors of a finished run's adapter file."""
    assert folder is not None
    return load_file(folder / ADAPTER)


def saved(folder: Path, state: dict[str, torch.Tensor], step: int = 1, keep: int = 2, **said: object) -> Checkpoint:
    """A checkpoint of this state, written and opened again."""
    Checkpoints(folder, keep).save(state, meta(step, **said))
    found = newest(folder)
    assert found is not None
    return found


def meta(step: int, **said: object) -> Meta:
    about = {"steps": 9, "epoch": 0, "batch": step, "seed": 0, "lr": 0.1, "engine": {"name": "ddp"}, "world_size": 1}
    belongs = {"base": "a model", "base_sha256": "0" * 64, "method": {"name": "snell", "rank": 4}, "classes": ["one"]}
    return Meta.model_validate({"step": step, **about, **belongs, **said})


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Bit-equal comparisons need the same number of threads everywhere."""
    from snell_dist import log

    torch.set_num_threads(1)
    log.LOGGER.setLevel("INFO")
