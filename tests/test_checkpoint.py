"""Training checkpoints: whole or absent, in this process and in the background, and never one of another run."""

import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, digest, meta, saved

from snell_dist import checkpoint
from snell_dist.build import build
from snell_dist.checkpoint import Checkpoints, finished, newest, opened
from snell_dist.config import UserError, load
from snell_dist.engines import Engine
from snell_dist.run_config import Run

STATE = {"model/w": torch.arange(6.0).view(2, 3), "optimizer/w/step": torch.tensor(3.0), "model/b": torch.ones(4)}


def engine(*overrides: str, config: str = "demo") -> Engine:
    return build(load(config, [*TINY, *overrides], Run).config, None, torch.device("cpu")).engine


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("background", [False, True])
def test_what_is_written_is_read_and_the_newest_few_stay(background: bool, tmp_path: Path) -> None:
    writer = Checkpoints(tmp_path, keep=2, background=background)
    for step in (2, 4, 6):
        state = {key: tensor + step for key, tensor in STATE.items()}
        writer.save(state, meta(step))
        for tensor in state.values():  # training goes on
            tensor.add_(100)
    writer.settle(wait=True)
    assert names(tmp_path) == ["latest", "step_00000004", "step_00000006"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step_00000006\n"
    found = newest(tmp_path)
    assert found is not None
    assert found.damage(contents=True) is None
    assert found.meta.without_state == ["b"]
    assert found.specs()["model/w"] == ((2, 3), torch.float32)
    read = found.tensors()
    assert read.keys() == STATE.keys()
    assert all(torch.equal(read[key], tensor + 6) for key, tensor in STATE.items())


def test_one_that_is_being_written_has_no_name_yet(tmp_path: Path) -> None:
    writer = Checkpoints(tmp_path, keep=2, background=True)
    writer.save(STATE, meta(2))
    assert newest(tmp_path) is None
    writer.settle(wait=True)
    assert names(tmp_path) == ["latest", "step_00000002"]
    (tmp_path / "checkpoints/.tmp_step_00000004").mkdir()  # what a kill leaves
    writer.save(STATE, meta(6))
    writer.settle(wait=True)
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000006"]


@pytest.mark.parametrize("background", [False, True])
def test_where_it_cannot_be_written_the_older_one_stays(background: bool, tmp_path: Path) -> None:
    """The limit on a file's size stands for a full disk: the kernel refuses the write."""
    saved(tmp_path, STATE, 2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        writer = Checkpoints(tmp_path, keep=1, background=background)
        with pytest.raises(
            UserError,
            match=r"cannot save step 4: a file was cut short \([\d,]+ MiB are free there\); step_00000002 stays",
        ):
            writer.save({"model/w": torch.zeros(100_000)}, meta(4))
            writer.settle(wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["latest", "step_00000002"]
    assert digest(saved(tmp_path, STATE, 6).tensors()) == digest(STATE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        saved(tmp_path, STATE)


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints"):
        saved(tmp_path, STATE)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "meta.json").unlink(), "no training checkpoint"),
        (lambda path: (path / "meta.json").write_text("{"), "not of this version"),
        (lambda path: (path / "__0_0.distcp").unlink(), "is missing"),
        (lambda path: (path / "__0_0.distcp").write_bytes((path / "__0_0.distcp").read_bytes()[:-9]), "bytes of"),
        (lambda path: (path / ".metadata").write_bytes(b""), "bytes of"),
    ],
)
def test_a_damaged_one_is_passed_over_for_the_one_before(damage, said, tmp_path, caplog) -> None:  # type: ignore[no-untyped-def]
    saved(tmp_path, STATE, 2, keep=5)
    damage(saved(tmp_path, STATE, 4, keep=5).path)
    found = newest(tmp_path)
    assert found is not None and found.meta.step == 2
    assert said in caplog.text
    saved(tmp_path, STATE, 6, keep=1)
    assert [c.meta.step for c in finished(tmp_path)] == [6]


def test_changed_bytes_are_found_by_their_hash_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, STATE, 2, keep=5)
    found = saved(tmp_path, STATE, 4, keep=5)
    file = found.path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert found.damage(contents=False) is None
    said = "__0_0.distcp has other contents than were written"
    assert found.damage(contents=True) == said
    before = newest(tmp_path)
    assert before is not None and before.meta.step == 2
    assert f"checkpoint {found.path} is damaged and left alone: {said}" in caplog.messages


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'done'}",)

    found = saved(tmp_path, STATE)
    (found.path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"names \w+\.system"):
        opened(found.path).specs()
    assert not (tmp_path / "done").exists()


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    found = saved(tmp_path, engine("method.rank=4").state())
    with pytest.raises(UserError, match="another run's"):
        engine(config="demo/linear").load_state(found)
    with pytest.raises(UserError, match=r"belongs to a model with weights 0000.*the weights here are 1111"):
        found.check("1" * 64, {"name": "snell", "rank": 4})
    with pytest.raises(UserError, match=r"method.rank = 8 here and 4 there"):
        found.check("0" * 64, {"name": "snell", "rank": 8})
    with pytest.raises(UserError, match=r"blocks.0.attn.qkv.a is \[16, 12\] there, \[16, 6\] here"):
        engine("method.rank=2").load_state(found)


def test_a_kill_in_the_midst_of_deleting_leaves_no_half_of_one(tmp_path, monkeypatch, caplog) -> None:  # type: ignore[no-untyped-def]
    def killed(path: Path) -> None:
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    saved(tmp_path, STATE, 2, keep=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        saved(tmp_path, STATE, 4, keep=1)
    assert [c.meta.step for c in finished(tmp_path)] == [4]
    assert "damaged" not in caplog.text
    saved(tmp_path, STATE, 6, keep=1)
    assert names(tmp_path) == ["latest", "step_00000006"]


def test_the_same_step_may_be_written_again(tmp_path: Path) -> None:
    saved(tmp_path, STATE, 2)
    again = saved(tmp_path, {"model/w": torch.zeros(2)}, 2)
    assert again.specs().keys() == {"model/w"}
    assert json.loads((again.path / "meta.json").read_text())["step"] == 2
    shutil.rmtree(again.path)
    assert newest(tmp_path) is None
    assert checkpoint.LATEST in names(tmp_path)
