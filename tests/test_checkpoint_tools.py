"""`snell checkpoint`, as a user calls it, on what real runs and a real DeepSpeed wrote."""

import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from conftest import ENVIRONMENT, TINY, saved, train
from deepspeed_folder import NAME, SIZES, STAGES, write
from ranks import together
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from snell_dist import adapter, weights
from snell_dist.build import build
from snell_dist.cli import main
from snell_dist.config import load
from snell_dist.files import sha256
from snell_dist.run_config import Run

# The last weights, so that a run's own adapter file is what its last checkpoint must give.
LAST = ["method.rank=4", "protocol.select=last"]
DDP, FSDP, ZERO = ["optim.ema_decay=0.5"], ["engine.name=fsdp"], ["engine.name=zero", "engine.stage=3"]
STATE = {
    "model/w": torch.arange(6.0).view(2, 3), "model/b": torch.ones(4), "model/index": torch.arange(3),
    "optimizer/w/step": torch.tensor(3.0), "optimizer/w/m": torch.ones(2, 3),
    "optimizer/b/step": torch.tensor(3.0), "optimizer/b/m": torch.ones(4),
}  # fmt: skip


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str], list[str]]]:
    """Runs `snell checkpoint`; returns its status, what it said, and what it complained of."""

    def run(*arguments: str | Path) -> tuple[int, list[str], list[str]]:
        status = main(["checkpoint", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outcome = train(tmp_path_factory.mktemp("runs"), *LAST, *DDP)
    assert outcome.folder is not None
    return outcome.folder


@pytest.fixture
def mine(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be damaged."""
    return shutil.copytree(run_folder, tmp_path / "run")


def torchrun(*command: str | Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def raw(checkpoint: Path, to: Path) -> dict[str, torch.Tensor]:
    """Its tensors, by torch's own tool."""
    dcp_to_torch_save(checkpoint, to)
    return torch.load(to)


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# what is there


def test_a_run_is_listed_as_it_lies_there(run_folder: Path, tmp_path: Path, says: Callable) -> None:
    status, out, _ = says("ls", run_folder, "--json")
    assert status == 0
    said = json.loads("\n".join(out))
    assert (said["latest"], said["leftovers"]) == ("step_00000006", [])
    for one, step in zip(said["checkpoints"], (4, 6), strict=True):
        path = run_folder / f"checkpoints/step_{step:08d}"
        assert one["path"] == str(path)
        assert (one["step"], one["steps"], one["epoch"], one["engine"], one["world_size"]) == (step, 6, 0, "ddp", 1)
        assert one["bytes"] == size(path)
        assert one["tensors"] == len(raw(path, tmp_path / "raw.pt"))
        assert (one["problem"], one["latest"]) == (None, step == 6)
    status, out, _ = says("ls", run_folder)
    assert out[0].split() == ["step", "epoch", "written", "engine", "ranks", "size", "tensors"]
    assert re.fullmatch(
        r"4 of 6      0  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ddp         1  +\d\.\d MiB +\d+  whole", out[1]
    )
    assert out[2].endswith("  latest, whole")
    assert says("ls", run_folder / "checkpoints")[1] == out
    assert says("ls", run_folder / "checkpoints/step_00000004")[1] == out[:2]


def test_what_is_damaged_or_left_over_is_said(mine: Path, says: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    (mine / "checkpoints/step_00000006/__0_0.distcp").unlink()
    (mine / "checkpoints/.tmp_step_00000008").mkdir()
    other = shutil.copytree(mine / "checkpoints/step_00000004", mine / "checkpoints/step_00000002")
    (other / "meta.json").write_bytes(b"\xff\xfe")
    status, out, _ = says("ls", mine)
    assert status == 0
    assert re.match(r" *2      -  [\d :-]+  - +-  +0\.\d MiB +-  DAMAGED: meta.json: is not of this version", out[1])
    assert out[2].endswith("whole")
    assert out[3].endswith("latest, DAMAGED: __0_0.distcp is missing")
    assert out[4] == "latest names step_00000006, which is damaged; a resumed run starts from step_00000004"
    assert out[5] == ".tmp_step_00000008: of a save that was cut off, or goes on now"
    (mine / "checkpoints/latest").write_text("step_00000009\n")
    assert "latest names step_00000009, which is not there" in says("ls", mine)[1][4]
    monkeypatch.chdir(mine / "checkpoints/step_00000004")
    assert says("ls", ".")[1][1].endswith("whole")


# is it whole


def test_real_runs_are_whole(run_folder: Path, tmp_path: Path, says: Callable) -> None:
    status, out, _ = says("verify", run_folder)
    assert status == 0
    tensors = raw(run_folder / "checkpoints/step_00000006", tmp_path / "raw.pt")
    count = sum(key.startswith("model/") for key in tensors)
    assert out[1] == (
        f"{run_folder}/checkpoints/step_00000006: whole: 2 files, {len(tensors)} tensors, all finite;"
        f" optimizer state of {count} of {count}"
    )


def test_moments_in_8_bits_are_whole(tmp_path: Path, says: Callable) -> None:
    """Large tensors have tables of their own beside the moments, small ones have none."""
    pytest.importorskip("bitsandbytes")
    folder = train(tmp_path, *LAST, "optim.name=adamw8bit", "backbone.width=64", "method.rank=32").folder
    tensors = raw(folder / "checkpoints/step_00000006", tmp_path / "raw.pt")
    assert {key.rpartition("/")[2] for key in tensors} >= {"qmap1", "absmax2", "state1", "step"}
    assert says("verify", folder)[0] == 0


def test_those_without_optimizer_state_are_named(tmp_path: Path, says: Callable) -> None:
    saved(tmp_path, STATE)
    assert says("verify", tmp_path)[1][0].endswith("7 tensors, all finite; optimizer state of 2 of 3, not of index")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model/w": torch.tensor([[1.0, float("nan"), 0.0]] * 2)}, "model/w not finite"),
        ({"optimizer/w/m": torch.full((2, 3), float("inf"))}, "optimizer/w/m not finite"),
        ({"optimizer/b/m": None}, "lacks optimizer/b/m"),
        ({"optimizer/b/m": torch.ones(5)}, "optimizer/b/m has shape [5], and the tensor of the model [4]"),
        ({"ema/w": torch.ones(3, 2)}, "ema/w has shape [3, 2], and the tensor of the model [2, 3]"),
        ({"ema/other": torch.ones(3)}, "ema/other belongs to no tensor of the model"),
        ({"optimizer/gone/m": torch.ones(3)}, "optimizer/gone/m belongs to no tensor of the model"),
    ],
)
def test_tensors_that_cannot_be_resumed_from(change: dict, said: str, tmp_path: Path, says: Callable) -> None:
    saved(tmp_path, {key: tensor for key, tensor in (STATE | change).items() if tensor is not None})
    assert says("verify", tmp_path)[:2] == (2, [f"{tmp_path}/checkpoints/step_00000001: DAMAGED: {said}"])


def test_optimizer_state_that_was_written_and_is_gone(tmp_path: Path, says: Callable) -> None:
    """What meta.json says of it is another witness than the list of tensors."""
    one = saved(tmp_path, {key: tensor for key, tensor in STATE.items() if not key.startswith("optimizer/b")})
    said = json.loads((one.path / "meta.json").read_text())
    assert said["without_state"] == ["b", "index"]
    (one.path / "meta.json").write_text(json.dumps(said | {"without_state": ["index"]}))
    assert says("verify", tmp_path)[1][0].endswith("DAMAGED: lacks the optimizer state of b")


def evil(file: Path, done: Path) -> None:
    """A pickle that makes a file when it is read."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {done}",)

    file.write_bytes(pickle.dumps(Evil()))


def rehashed(path: Path) -> None:
    """Has meta.json say what the files are now."""
    said = json.loads((path / "meta.json").read_text())
    said["files"] = {name: ((path / name).stat().st_size, sha256(path / name)) for name in said["files"]}
    (path / "meta.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: flip(path / "__0_0.distcp"), "__0_0.distcp has other contents than were written"),
        (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
        (lambda path: (path / "meta.json").unlink(), "is no training checkpoint (it has no meta.json)"),
        (lambda path: (path / "meta.json").write_text('{"format": "snell_dist checkpoint 9"}'), "meta.json: is not of"),
        (lambda path: ((path / ".metadata").write_bytes(pickle.dumps({})), rehashed(path)), ".metadata: is damaged"),
        (lambda path: (evil(path / ".metadata", path / "done"), rehashed(path)), "system"),
        (lambda path: ((path / "__0_0.distcp").write_bytes(b"PK"), rehashed(path)), "cannot be read"),
    ],
)
def test_damage_is_found_and_the_one_before_is_exported(
    damage: Callable, said: str, mine: Path, tmp_path: Path, says: Callable
) -> None:
    bad = mine / "checkpoints/step_00000006"
    damage(bad)
    status, out, _ = says("verify", mine)
    assert status == 2
    assert ": whole: " in out[0]
    assert out[1].startswith(f"{bad}: DAMAGED: ") and said in out[1]
    assert not (bad / "done").exists()
    status, out, err = says("export", mine, "--to", tmp_path / "a.safetensors")
    assert (status, len(out)) == (0, 1)
    assert "after step 4 of 6" in out[0]
    assert len(err) == 1 and err[0].startswith(f"passed over: {bad}: DAMAGED: ")
    status, _, err = says("export", bad, "--to", tmp_path / "b.safetensors")
    assert status == 2
    assert len(err) == 1 and said in err[0] and err[0].endswith("see snell checkpoint ls for others of its run")
    assert not (tmp_path / "b.safetensors").exists()


# to take away


def test_an_export_is_the_adapter_file_that_the_run_wrote(run_folder: Path, tmp_path: Path, says: Callable) -> None:
    """The run ends with its moving average; torch's own reader knows the weights themselves."""
    average, plain = tmp_path / "average.safetensors", tmp_path / "plain.safetensors"
    status, out, _ = says("export", run_folder, "--to", average, "--ema")
    assert status == 0
    path = run_folder / "checkpoints/step_00000006"
    assert out == [f"{average}: the moving average after step 6 of 6, from {path}"]
    theirs = load_file(run_folder / "adapter.safetensors")
    assert same(load_file(average), theirs)
    with safe_open(average, "pt") as a, safe_open(run_folder / "adapter.safetensors", "pt") as b:
        assert a.metadata() == b.metadata()
    assert says("export", path, "--to", plain)[0] == 0
    tensors = raw(path, tmp_path / "raw.pt")
    assert same(load_file(plain), {k[6:]: t for k, t in tensors.items() if k.startswith("model/")})
    assert not same(load_file(plain), theirs)
    built = build(load(str(run_folder / "config.yaml"), [], Run).config, None, torch.device("cpu"))
    built.engine.load_weights(adapter.load(average, built.engine.weights(), built.fingerprint))
    assert same(dict(built.engine.weights()), theirs)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("engine", [FSDP, ZERO], ids=["fsdp", "zero"])
def test_what_two_processes_wrote_is_read_by_one(engine: list[str], tmp_path: Path, says: Callable) -> None:
    torchrun("-m", "snell_dist", "train", "demo", *TINY, *LAST, *engine, "--out", tmp_path)
    folder = tmp_path / "demo/001"
    line = says("ls", folder)[1][2]
    assert re.search(rf"{engine[0].partition('=')[2]}\S*  +2  .* latest, whole$", line)
    status, out, _ = says("verify", folder)
    assert status == 0
    assert ": whole: 3 files, " in out[1]
    file = tmp_path / "taken.safetensors"
    assert says("export", folder, "--to", file)[0] == 0
    assert same(load_file(file), load_file(folder / "adapter.safetensors"))


def test_nothing_is_overwritten_or_half_written(run_folder: Path, tmp_path: Path, says: Callable) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_text("precious")
    status, _, err = says("export", run_folder, "--to", file)
    assert (status, err) == (2, [f"snell: --to {file}: exists and stays as it is; choose another name"])
    assert file.read_text() == "precious"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # stands for a full disk
    try:
        status, _, err = says("export", run_folder, "--to", tmp_path / "other.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert len(err) == 1 and f"{tmp_path}/other.safetensors: cannot be written: " in err[0]
    assert [p.name for p in tmp_path.iterdir()] == ["mine.safetensors"]


def test_bad_input_is_one_line(run_folder: Path, tmp_path: Path, says: Callable) -> None:
    saved(tmp_path / "plain", STATE)
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh/config.yaml").write_text("")
    (tmp_path / "cut/checkpoints/.tmp_step_00000002").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    to = ["--to", tmp_path / "new/a.safetensors"]
    for verb, more in (("ls", []), ("verify", []), ("export", ["--to", tmp_path / "a.safetensors"])):
        for name, said in (
            (
                "plan",
                "plan: no such folder, did you mean 'plain'?; expected is a run folder, which has checkpoints/step_",
            ),
            ("file", "file: is a file; expected is a run folder"),
            ("empty", "empty: has no checkpoint; expected is a run folder"),
            ("fresh", "fresh: has no checkpoint yet; train.save_every says"),
            ("cut", "cut: has no checkpoint that is whole, only .tmp_step_00000002 of a save"),
            (
                ".",
                "has no checkpoint; expected is a run folder, which has checkpoints/step_<number>, or one such step;"
                f" did you mean {tmp_path}/plain?",
            ),
        ):
            status, out, err = says(verb, tmp_path / name, *more)
            assert (status, out, len(err)) == (2, [], 1)
            assert said in err[0]
    for arguments, said in (
        (["export", run_folder, *to], f"there is no folder {tmp_path}/new; make it first"),
        (["export", tmp_path / "plain", "--ema", "--to", tmp_path / "a.safetensors"], "has no moving average"),
        (["convert", tmp_path / "empyt", *to], "no such folder, did you mean 'empty'?; expected is what DeepSpeed's"),
        (["convert", tmp_path / "file", *to], "file: is a file; expected is what DeepSpeed's save_checkpoint wrote"),
        (["convert", tmp_path / "empty", *to], "empty: is no DeepSpeed checkpoint; expected is what"),
        (["convert", run_folder, *to], "it is of snell_dist, and snell checkpoint export makes"),
        (["convert", run_folder / "checkpoints", *to], "it is of snell_dist"),
        (["convert", run_folder / "checkpoints/step_00000006", *to], "it is of snell_dist"),
    ):
        status, out, err = says(*arguments)
        assert (status, out, len(err)) == (2, [], 1)
        assert said in err[0]
    assert not list(tmp_path.glob("*a.safetensors*")) and not (tmp_path / "new").exists()


# DeepSpeed's


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What deepspeed_folder.py writes: a folder for each stage."""
    folder = tmp_path_factory.mktemp("theirs")
    together(2, write, folder)
    return folder


@pytest.mark.xdist_group("deepspeed_folder")
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeeds_weights_are_those_that_were_in_memory(
    stage: int, theirs: Path, tmp_path: Path, says: Callable
) -> None:
    """Trained in bfloat16 on two processes: the float32 masters, the frozen block, a tied weight, and a buffer."""
    folder, to = theirs / str(stage), tmp_path / "converted"
    status, out, err = says("convert", folder / "saved", "--to", to, "--trust")
    assert (status, err) == (0, [])
    assert out == [f"{to}/model.safetensors: 33 tensors; backbone.weights={to} reads it as timm or open_clip"]
    assert [p.name for p in to.iterdir()] == ["model.safetensors"]
    found, live = load_file(to / "model.safetensors"), torch.load(folder / "live.pt")
    assert same(found, live)
    assert {str(t.dtype) for name, t in found.items() if name != "seen"} == {"torch.float32"}
    fresh = timm.create_model(NAME, **SIZES)
    assert weights.fit(fresh, weights.read(to), keep_head=True).fraction == 1
    assert all(torch.equal(tensor, live[name]) for name, tensor in fresh.state_dict().items())
    status, _, err = says("convert", folder / "saved/global_step2", "--to", to, "--trust")
    assert (status, err) == (2, [f"snell: --to {to}: exists and stays as it is; choose another name"])


@pytest.mark.xdist_group("deepspeed_folder")
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda step: next(step.glob("*rank_1*optim*")).unlink(), "Expected 2 of '*_optim_states.pt'"),
        (lambda step: os.truncate(next(step.glob("*rank_1*optim*")), 9_000), "is every rank's file there and whole?"),
        (lambda step: (step.parent / "latest").unlink(), "has no `latest` that says which step; name a step itself"),
        (lambda step: (step.parent / "latest").write_text("global_step9"), "names 'global_step9', which is not there"),
        (lambda step: [p.unlink() for p in step.glob("*optim*")], "so ZeRO 1, 2 or 3 did not write it"),
        (lambda step: [p.unlink() for p in step.glob("*model*")], "is no DeepSpeed checkpoint; expected is what"),
    ],
)
def test_what_deepspeed_cannot_read_leaves_nothing(
    damage: Callable, said: str, theirs: Path, tmp_path: Path, says: Callable
) -> None:
    folder = shutil.copytree(theirs / "2/saved", tmp_path / "saved")
    damage(folder / "global_step2")
    status, out, err = says("convert", folder, "--to", tmp_path / "new", "--trust")
    assert (status, out, len(err)) == (2, [], 1)
    assert str(folder) in err[0] and said in err[0]
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_nothing_of_deepspeeds_is_executed_without_trust(
    tmp_path: Path, says: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = tmp_path / "saved/global_step2"
    step.mkdir(parents=True)
    (tmp_path / "saved/latest").write_text("global_step2")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        evil(step / name, tmp_path / "done")
    status, _, err = says("convert", tmp_path / "saved", "--to", tmp_path / "new")
    assert (status, len(err)) == (2, 1)
    assert "runs what is in them; add --trust where you know who wrote them" in err[0]
    for module in ("deepspeed", "deepspeed.utils.zero_to_fp32"):
        monkeypatch.setitem(sys.modules, module, None)
    status, _, err = says("convert", tmp_path / "saved", "--to", tmp_path / "new", "--trust")
    assert (status, len(err)) == (2, 1)
    assert err[0].endswith("needs DeepSpeed: pip install 'snell_dist[deepspeed]'")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["saved"]
