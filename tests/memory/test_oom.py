"""Out of memory: real processes that may not have what a step needs, and the page that they leave."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import true_step
from conftest import ENVIRONMENT, command, snell, train, typed
from disturbed import AROUND, keeps, started, torchrun

from snell_dist import exits, job, run_folder
from snell_dist.build import Built, build
from snell_dist.config import load
from snell_dist.footprint import Category, Phase
from snell_dist.keep import launches
from snell_dist.limits import GROUPS, ran_out
from snell_dist.memory import device, oom, rehearsal
from snell_dist.memory.device import Figures
from snell_dist.memory.gpus import MIB, parse_size
from snell_dist.memory.predict import Predictor
from snell_dist.memory.remedies import Failure, diagnose
from snell_dist.run_config import Run

# 1118 MiB at the peak of a step of all 256 images
LARGE = [
    "demo", "backbone.weights=null", "backbone.width=64", "backbone.depth=4", "backbone.heads=2",
    "backbone.image_size=32", "data.image_size=32", "data.batch_size=256", "data.eval_batch_size=16", "train.steps=4",
    "train.log_every=1", "train.eval_every=null", "train.save_every=2", "train.device=cpu",
]  # fmt: skip
ROOM = 200 * MIB  # beyond what a run of a few images at a time takes
# Each tensor a mapping of its own: a limit on the address space counts those that live, and no loose pieces of a heap.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536"}
TENSORS = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15.77 GiB of which 7.38 MiB"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run of 16 images at a time as it was when it had saved, and the address space that it took to its end."""
    folder, copy, peak = tmp_path_factory.mktemp("begun") / "run", tmp_path_factory.mktemp("copy") / "run", 0
    words = command("train", *LARGE, "data.micro_batch_size=16", "--folder", folder)
    with started(folder.with_suffix(".log"), words, **MAPPED) as process:
        while process.poll() is None:
            found = re.search(r"VmPeak:\s*(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = int(found[1]) * 1024 if found else peak
            if run_folder.saved_at(folder) and not copy.exists():
                shutil.copytree(folder, copy)
            time.sleep(0.05)
    assert process.returncode == 0, folder.with_suffix(".log").read_text()
    assert not run_folder.is_complete(copy)
    return copy, peak


def within(limit: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@pytest.mark.xdist_group("oom")
def test_a_step_that_does_not_fit_is_explained_and_the_first_advice_fits(
    begun: tuple[Path, int], tmp_path: Path
) -> None:
    folder, limit = tmp_path / "run", begun[1] + ROOM
    shutil.copytree(begun[0], folder)
    again = ["train", *LARGE, "--resume", "--folder", folder]
    done = snell(*again, "data.micro_batch_size=256", preexec_fn=within(limit), env=ENVIRONMENT | MAPPED)
    assert done.returncode == exits.Exit.OUT_OF_MEMORY, done.stderr
    assert "Traceback" not in done.stderr + (folder / "train.log").read_text()
    page = (folder / "oom_rank0.txt").read_text()
    assert page in done.stderr
    assert len(page.splitlines()) < 20
    assert re.fullmatch(r"snell: out of memory in .*; try data\.micro_batch_size=\d+", done.stderr.splitlines()[-1])

    run = load(LARGE[0], LARGE[1:], Run).config
    made = rehearsal.prepare(run, torch.device("cpu"), run.data.batch_size)
    said = re.search(r"^where +(?:forward|backward), ([\w.]+) \((\w+)\)", page, re.MULTILINE)
    assert said is not None, page
    assert type(made.backbone.model.get_submodule(said[1])).__name__ == said[2]
    assert page.startswith("Out of memory: rank 0 of 1 on ")
    asked = re.search(r"^asked for +[\d.]+ MiB of (.*)$", page, re.MULTILINE)
    assert asked is not None
    assert asked[1].split(" or ")[0] in {category.value for category in Category}
    planned = re.search(r"^the plan +([\d.]+ \w+) at the peak", page, re.MULTILINE)
    assert planned is not None
    assert parse_size(planned[1], "") == pytest.approx(true_step(made).peak(scratch=True), rel=0.01)

    advice = re.findall(r"^ +\d  (\S+=\S+(?: \S+=\S+)*)  .*saves", page, re.MULTILINE)
    assert len(advice) == 3
    for overrides in advice:
        assert snell("config", "show", *LARGE, *overrides.split()).returncode == 0
    assert typed("checkpoint", "verify", folder).returncode == 0
    done = snell(*again, *advice[0].split(), preexec_fn=within(limit), env=ENVIRONMENT | MAPPED)
    assert done.returncode == 0, done.stderr
    assert run_folder.is_complete(folder)


@pytest.mark.xdist_group("oom")
@pytest.mark.timeout(600)
def test_of_two_ranks_one_runs_out_and_keep_ends_it(begun: tuple[Path, int], tmp_path: Path) -> None:
    run, log, limit = tmp_path / "run", tmp_path / "log", (begun[1] + ROOM) // 1024
    limited = f'if [ "$RANK" = 1 ]; then ulimit -v {limit}; fi; exec "$@"'
    words = [*LARGE, "data.batch_size=384", "data.micro_batch_size=192", "--folder", str(run), "--resume-if-any"]
    launched = torchrun("--no-python", "sh", "-c", limited, "sh", *command("train", *words), restarts=3)
    with started(log, keeps(run, launched), **MAPPED) as kept:
        assert kept.wait(timeout=300) == exits.Exit.OUT_OF_MEMORY, log.read_text()
    assert "Out of memory: rank 1 of 2 on " in (run / "oom_rank1.txt").read_text()
    assert not (run / "oom_rank0.txt").exists()
    assert [each.outcome for each in launches(run)] == ["out of memory"]
    assert len(run_folder.attempts(run)) == 1


def test_a_model_that_cannot_be_built_is_one_line(tmp_path: Path) -> None:
    """48 blocks of 0.8 GB each."""
    words = ["train", *LARGE, "backbone.width=4096", "backbone.depth=48", "--folder", tmp_path / "run"]
    done = snell(*words, preexec_fn=within(6 << 30))
    assert done.returncode == exits.Exit.OUT_OF_MEMORY, done.stderr
    assert re.fullmatch(r"snell: demo: out of memory before the first step \(.*\); snell plan demo .*\n", done.stderr)
    assert not (tmp_path / "run").exists()


def in_block(block: int) -> Callable[[Built], torch.nn.Module]:
    return lambda built: built.engine.model.get_submodule(f"blocks.{block}.mlp.fc1")


def fail(*_: Any) -> None:
    raise torch.OutOfMemoryError(TENSORS)


def in_the_second_forward(module: torch.nn.Module) -> None:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: fail() if calls else calls.append(1))


PLACES: dict[str, tuple[list[str], Callable[[Built], Any]]] = {
    "forward, blocks.1.mlp.fc1": ([], lambda built: in_block(1)(built).register_forward_pre_hook(fail)),
    "backward, blocks.0.mlp.fc1": ([], lambda built: in_block(0)(built).register_full_backward_pre_hook(fail)),
    "recompute, blocks.0.mlp.fc1": (["remat.policy=block"], lambda built: in_the_second_forward(in_block(0)(built))),
    "the optimizer's update": ([], lambda built: built.engine._optimizer.register_step_pre_hook(fail)),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("place", PLACES)
def test_where_it_failed(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is torch's exception, raised by hand at a known place."""
    overrides, arrange = PLACES[place]

    def arranged(*arguments: Any) -> Built:
        built = build(*arguments)
        arrange(built)
        return built

    monkeypatch.setattr(job, "build", arranged)
    with pytest.raises(oom.OutOfMemory, match=re.escape(f"out of memory in {place}")):
        train(tmp_path, *overrides)
    page = next(tmp_path.rglob("oom_rank0.txt")).read_text()
    assert re.search(f"^where +{re.escape(place)}", page, re.MULTILINE)
    assert "at the peak" in page


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    def arranged(*arguments: Any) -> Built:
        built = build(*arguments)
        built.engine.model.register_forward_pre_hook(broken)
        return built

    monkeypatch.setattr(job, "build", arranged)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train(tmp_path)
    assert not list(tmp_path.rglob("oom_*"))


@pytest.mark.parametrize(
    ("message", "asked", "rounding"),
    [
        (TENSORS, 20 * MIB, MIB // 100),
        ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
         " allocate 25264128 bytes. Error code 12 (Cannot allocate memory)", 25264128, 0),
        ("std::bad_alloc", None, 0),
    ],
)  # fmt: skip
def test_what_was_asked_for(message: str, asked: int | None, rounding: int) -> None:
    assert ran_out(RuntimeError(message))
    assert oom.asked_for(message) == (asked, rounding)


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.BACKWARD])
@pytest.mark.parametrize("block", ["blocks.0", "blocks.2", "blocks.4"])
def test_requests_of_blocks_that_stand_out_are_those_of_the_whole_depth(block: str, phase: Phase) -> None:
    run = load("demo", ["backbone.weights=null", "backbone.depth=6"], Run).config
    found, true = (
        Predictor(run, "cpu", every_block=every).births(phase, f"{block}.mlp.fc1", 8) for every in (False, True)
    )
    assert found == true
    assert len({birth.live for birth in found}) > 1


def test_a_cpu_tells_nothing_of_a_gpu(tmp_path: Path) -> None:
    said = device.figures(torch.device("cpu"))
    assert said == Figures()
    assert said.fragmentation is None
    assert Figures(allocated=3, reserved=5).fragmentation == 2
    if not torch.cuda.is_available():
        assert device.snapshot(tmp_path / "snapshot.pickle") is None


@pytest.fixture
def on_cuda(tmp_path: Path) -> Failure:
    """A block's matrices ask for 24 MiB on a GPU of 15 GiB that is nearly full; ViT-B, of 64 images."""
    figures = Figures(6000 * MIB, 6000 * MIB, 6500 * MIB, 6500 * MIB, 7000 * MIB, 15000 * MIB, 15360 * MIB)
    return Failure(
        message=TENSORS, rank=3, ranks=8, ranks_per_node=4, host="node1", device_type="cuda", capability=(8, 0),
        place="the forward pass", step=1, phase=Phase.FORWARD, block="blocks.7", module="blocks.7.mlp.fc1",
        kind="AdaptedLinear", sure=True, asked=148 * MIB, rounding=MIB // 100, images=64, micro_batch_size=64,
        eval_batch_size=64, held=400 * MIB, gradients=0, figures=figures, snapshot="run/oom_rank3.pickle",
    )  # fmt: skip


VITB = ["backbone.width=768", "backbone.depth=12", "backbone.heads=12", "backbone.image_size=224",
        "backbone.patch_size=16", "data.image_size=224", "data.batch_size=512", "backbone.weights=null"]  # fmt: skip


def configuration(folder: Path, *overrides: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(snell("config", "show", "demo", *VITB, *overrides).stdout)
    return file


def test_on_a_gpu_the_page_has_the_allocators_figures_and_says_what_is_in_pieces(
    on_cuda: Failure, tmp_path: Path
) -> None:
    """fc1's output [64, 197, 3072] in float32 is 147.75 MiB, for which the allocator asks 148 MiB."""
    found = diagnose(configuration(tmp_path), on_cuda)
    assert found.asked_for == [Category.ACTIVATIONS.value]
    page = oom.text(on_cuda, found, "", Path("run"))
    assert "rank 3 of 8 on node1, in step 1" in page
    assert "148.0 MiB of saved activations" in page
    assert "5.86 GiB of tensors, 6.35 GiB reserved, 6.84 GiB of this process, 14.65 GiB used by all, 15.00 GiB" in page
    assert "500.0 MiB are reserved and of no tensor" in page
    assert "expandable_segments:True" in page
    assert "run/oom_rank3.pickle" in page
    small = replace(on_cuda, figures=replace(on_cuda.figures, reserved=on_cuda.figures.allocated))
    assert "expandable_segments" not in oom.text(small, found, "", Path("run"))


def test_where_weights_are_too_much_they_are_divided_or_rounded(on_cuda: Failure, tmp_path: Path) -> None:
    """With one image at a time and full tuning: not the batch, the engine or the method is what helps."""
    tight = replace(on_cuda, images=1, micro_batch_size=1, asked=None, figures=Figures(allocated=700 * MIB))
    found = diagnose(configuration(tmp_path, "data.batch_size=8", "method.name=full"), tight)
    said = [" ".join(change.overrides) for change in found.changes]
    assert any("engine.name=fsdp" in words for words in said), said
    assert not any("micro_batch_size" in words for words in said)
    assert all(change.fits == (change.peak_bytes <= 0.95 * 700 * MIB) for change in found.changes)


def test_without_a_plan_the_page_says_why(on_cuda: Failure) -> None:
    page = oom.text(
        replace(on_cuda, phase=None, place="evaluation", module=""), None, "could not be made: why", Path("r")
    )
    assert "where        evaluation" not in page  # columns are as wide as they need be
    assert re.search(r"^where +evaluation$", page, re.MULTILINE)
    assert "data.eval_batch_size=32" in page
    assert re.search(r"^the plan +could not be made: why$", page, re.MULTILINE)


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group of 300 MiB."""
    version_1 = (GROUPS / "memory").is_dir()
    folder = (GROUPS / "memory" if version_1 else GROUPS) / f"snell_test_{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(300 * MIB))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield folder
    folder.rmdir()


def test_keep_names_the_kernels_kills(group: Path, tmp_path: Path) -> None:
    hog = [sys.executable, "-c", "kept = [bytearray(b'1' * (1 << 20)) for _ in range(1000)]", "--resume-if-any"]

    def join() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    words = keeps(tmp_path, hog, "--attempts", "1")
    done = subprocess.run(words, env=AROUND, capture_output=True, text=True, timeout=120, preexec_fn=join, check=False)
    assert done.returncode == exits.Exit.GAVE_UP, done.stderr
    assert "the kernel ended 1 process here for want of memory; allowed are 300 MiB by the control group" in done.stderr
