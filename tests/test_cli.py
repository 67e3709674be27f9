"""The command as a user types it: answers, exit status, and one clear line for every mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, snell, typed

from snell_dist.cli import main


@pytest.fixture
def error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Runs the command in an empty folder; returns the lines that it says when it ends with status 2."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> list[str]:
        try:
            status = main(list(map(str, arguments)))
        except SystemExit as exit:
            status = exit.code
        said = capsys.readouterr().err
        assert status == 2, said
        return said.splitlines()

    return run


def test_a_misspelt_key_exits_2_and_suggests_the_right_one() -> None:
    done = snell("train", ROOT / "configs/demo.yaml", "method.rnak=8")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("snell: command line: method.rnak = 8: unknown key, did you mean 'rank'?")


def test_help_and_config_errors_do_not_import_torch() -> None:
    """What keeps them under half a second; a test of time itself would depend on the machine."""
    for arguments in (["--help"], ["train", "demo", "method.rnak=8"], ["config", "ls"], ["config", "show", "demo"]):
        code = (
            "import sys; from snell_dist.cli import main\n"
            f"try: main({arguments!r})\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'timm', 'numpy', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.rank=18"], "method.rank = 18: is larger than a layer of 16 x 16 (allowed: at most 16)"),
        (
            ["method.targets=['*.fc3']"],
            "matches no linear layer (parts: q, k, v, proj, fc1, fc2; blocks: blocks.0, blocks.1)",
        ),
        (["method.also_train=[haed]"], "method.also_train = 'haed': matches no parameter"),
        (["backbone.weights=gone.safetensors"], "backbone.weights = 'gone.safetensors': no such file"),
        (["backbone.image_size=16"], "backbone.image_size: the model takes images"),
        (["backbone.image_size=9"], "must be a multiple of patch_size 2"),
        (["backbone.heads=3"], "backbone.heads = 3: must divide width 16"),
        (["data.micro_batch_size=5"], "data.micro_batch_size = 5: must divide"),
        (["train.device=cuda"], "train.device = 'cuda': this machine has none"),
        (["backbone.weights=config:dmeo"], "did you mean 'demo'?"),
        (["backbone.name=vti"], "did you mean 'vit'?"),
        (["backbone.head=file"], "backbone.head = 'file': needs backbone.weights"),
        (["task.name=contrastive"], "has no text tower"),
        (["precision.frozen=bfloat16"], "needs compute: bfloat16"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    overrides: list[str], message: str, tmp_path: Path, error: Callable
) -> None:
    import torch

    if "cuda" in str(overrides) and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    (line,) = error("train", "demo", *TINY, *overrides)
    assert message in line
    assert not any(tmp_path.iterdir())


def test_a_truncated_weights_file_is_named(tmp_path: Path, error: Callable) -> None:
    import torch
    from safetensors.torch import save_file

    file = tmp_path / "base.safetensors"
    save_file({"a": torch.ones(1000)}, file)
    (line,) = error("train", "demo", *TINY, f"backbone.weights={file}")
    assert "not a layout that is known; first keys: a (known: " in line
    os.truncate(file, 500)
    (line,) = error("train", "demo", *TINY, f"backbone.weights={file}")
    assert line.startswith(f"snell: backbone.weights = '{file}': ")
    assert "cut off" in line


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path: Path, error: Callable) -> None:
    (tmp_path / "runs").write_text("a file")
    (line,) = error("train", "demo", *TINY)
    assert "cannot make a run folder there" in line


def test_unknown_options_and_words(error: Callable) -> None:
    assert "unrecognized arguments: --resum" in "".join(error("train", "demo", "--resume", "--resum-me"))
    assert "expected key=value" in "".join(error("train", "demo", "rank"))
    assert "did you mean 'demo'?" in "".join(error("train", "dmeo"))
    assert "COMMAND" in "".join(error())
    assert "not allowed with" in "".join(error("train", "demo", "--resume", "--resume-if-any"))
    assert "unrecognized arguments: -- train" in "".join(error("stop", "run", "--", "train"))


def test_overrides_may_stand_behind_options(tmp_path: Path, error: Callable) -> None:
    (line,) = error("train", "demo", "--out", tmp_path, "method.rnak=8")
    assert "did you mean 'rank'?" in line


def test_config_verbs_work_anywhere(tmp_path: Path, error: Callable) -> None:
    listed = snell("config", "ls", cwd=tmp_path).stdout
    assert {"demo", "demo/lora", "demo/pretrain"} <= {line.split()[0] for line in listed.splitlines()}
    one = snell("config", "ls", "*/cifar_snell32", cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in one] == ["vtab/cifar_snell32"]
    assert "did you mean 'demo/lora'?" in "".join(error("config", "ls", "demo/lroa"))
    assert snell("config", "cp", "demo/lora", "mine.yaml", cwd=tmp_path).stdout == "mine.yaml\n"
    shown = snell("config", "show", "mine.yaml", "method.rank=2", cwd=tmp_path).stdout
    assert "rank: 2" in shown
    assert "name: lora" in shown
    assert "exists and stays as it is" in "".join(error("config", "cp", "demo/lora", "mine.yaml"))
    assert "did you mean 'demo/lora'?" in "".join(error("config", "cp", "demo/lroa"))
    assert json.loads(snell("config", "schema", cwd=tmp_path).stdout)["properties"]["method"]


def test_shown_configuration_is_itself_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(snell("config", "show", "demo").stdout)
    assert snell("config", "show", "shown.yaml", cwd=tmp_path).stdout == (tmp_path / "shown.yaml").read_text()


def test_a_pipe_gets_plain_lines_and_standard_output_only_the_result(tmp_path: Path) -> None:
    done = snell("train", "demo", *TINY, "method.rank=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr + done.stdout
    assert done.stdout.startswith("test accuracy ")
    assert len(done.stdout.splitlines()) == 1
    assert any(line.startswith("step 6/6  loss ") and "steps/s" in line for line in done.stderr.splitlines())


def test_eval_measures_a_base_and_a_finished_run(tmp_path: Path, error: Callable) -> None:
    """CLIP's base without training is its zero-shot accuracy; the run's is what its summary says."""
    from conftest import train

    outcome = train(tmp_path / "runs", "method.rank=4", "backbone.text_width=16", config="clip/digits")
    assert outcome.folder is not None
    done = typed("eval", outcome.folder)
    assert done.stdout.startswith(f"test accuracy {outcome.summary['test_accuracy']:.4f} loss "), done.stderr
    before = typed("eval", "clip/digits", *TINY, "--split", "val")
    assert before.stdout.startswith("val accuracy 0."), before.stderr
    assert before.stdout.strip().endswith("the base of clip/digits")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"], "looking leaves nothing behind"
    (outcome.folder / "adapter.safetensors").unlink()
    assert "adapter.safetensors: no such file" in error("eval", outcome.folder)[-1]
    assert "is no run folder" in error("eval", tmp_path)[-1]


def test_two_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    from snell_dist.config import UserError
    from snell_dist.run_folder import lock

    with lock(tmp_path), pytest.raises(UserError, match="another process is training there"), lock(tmp_path):
        pass
