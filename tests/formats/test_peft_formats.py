"""PEFT <-> ours: what a run leaves is an adapter there, on timm's model or Transformers', and comes back to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from finished_runs import finish
from peft import LoraConfig, PeftConfig, get_peft_model

from snell_dist import formats, imported
from snell_dist.adapter import ADAPTER
from snell_dist.cli import main
from snell_dist.config import Plugin, UserError, load
from snell_dist.peft import SnellConfig
from snell_dist.run_config import Run
from snell_dist.run_folder import read_summary
from snell_dist.tensor_files import read_tensors, write_tensors

DIGITS = {"name": "digits", "image_size": 32, "channels": 3, "classes": [5, 6, 7]}
WORDS = "five", "six", "seven"
SNELL = {"name": "snell", "rank": 2, "sparsity": 0.7}
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "vit": ("peft", "vit", SNELL, "classify"),
    "vit, some rows": ("peft", "vit", SNELL | {"targets": ["q", "v", "blocks.-1.fc1"], "kernel": "rbf"}, "classify"),
    "vit, snella": ("peft", "vit", {"name": "snella", "rank": 2}, "classify"),
    "swin": ("peft", "swin", SNELL | {"sparsify": "hard"}, "classify"),
    "convnext, lora": ("peft", "convnext", {"name": "lora", "rank": 2, "alpha": 3.0}, "classify"),
    "hf vit": ("peft_hf", "vit", SNELL, "classify"),
    "hf vit, some rows": ("peft_hf", "vit", SNELL | {"targets": ["q", "v", "fc2"]}, "classify"),
    "hf vit, lora": ("peft_hf", "vit", {"name": "lora", "rank": 2, "also_train": ["head"]}, "classify"),
    "hf swin": ("peft_hf", "swin", SNELL, "classify"),
    "hf clip": ("peft_hf", "clip", SNELL, "contrastive"),
}


def run_of(folder: Path, family: str, method: dict[str, Any], task: str = "classify") -> Path:
    backbone = {"name": family, **Plugin("backbones").find(family).smallest}  # type: ignore[attr-defined]
    return finish(folder, backbone, method, task=task, classes=WORDS, data=DIGITS)


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_computes_the_same_there_and_comes_back(tmp_path: Path, case: str) -> None:
    name, family, method, task = CASES[case]
    run, there, back = (tmp_path / part for part in ("run", "there", "back"))
    run_of(run, family, method, task)
    assert formats.export(run, name, there).error <= 1e-6
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in there.iterdir()}
    imported.bring(load(str(run / "config.yaml"), [], Run), there, back, tmp_path)
    ours, theirs = read_tensors(run / ADAPTER), read_tensors(back / ADAPTER)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert read_summary(back)["base_sha256"] == read_summary(run)["base_sha256"]
    pictures = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(formats.serve(back).logits(pictures), formats.serve(run).logits(pictures))


def test_what_does_not_belong_together_is_said_in_one_line(tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "there"
    run_of(run, "vit", SNELL)
    formats.export(run, "peft", there)

    def refused(match: str, *overrides: str, folder: Path = there) -> None:
        loaded = load(str(run / "config.yaml"), list(overrides), Run)
        with pytest.raises(UserError, match=match) as caught:
            imported.bring(loaded, folder, tmp_path / "back", tmp_path)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "back").exists()

    other = tmp_path / "other.safetensors"
    base = tmp_path / "run.base.safetensors"
    write_tensors(other, {name: tensor + 1 for name, tensor in read_tensors(base).items()}, {})
    refused("was trained on another base: weights of the adapted layers differ", f"backbone.weights={other}")
    refused(r"has head.(bias|weight) \[3.*, and the model \[2", "data.classes=[1,2]")
    refused("adapts blocks.1.attn.proj, which neither", "backbone.depth=1", "backbone.min_match=0")
    refused("no adapter of PEFT", folder=tmp_path)

    config = json.loads((there / "adapter_config.json").read_text())
    (there / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {"fc1": 4}}))
    refused("fc1")
    (there / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    refused("IA3")


def test_what_peft_has_no_place_for_is_refused(tmp_path: Path) -> None:
    def refused(match: str, family: str, method: dict[str, Any], name: str = "peft") -> None:
        run = run_of(tmp_path / family / method["name"], family, method)
        with pytest.raises(UserError, match=match):
            formats.export(run, name, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("cls_token trains, for which LoRA in PEFT has no place", "vit", {"name": "lora", "rank": 2})
    refused("PEFT has no method that is sparse", "vit", {"name": "sparse", "criterion": "magnitude"})
    refused("choose peft_hf, for Transformers' CLIP", "clip", SNELL)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", "vit", SNELL)
    formats.export(run, "peft_hf", tmp_path / "there")
    command = ["import", *map(str, (tmp_path / "there", run / "config.yaml", "--to", tmp_path / "back"))]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("test accuracy 0.")
    assert json.loads((tmp_path / "back" / "run.json").read_text())[0]["imported"] == str(tmp_path / "there")
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"snell: --to {tmp_path / 'back'}: exists and stays as it is; choose another name"]


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_an_adapter_that_peft_made_becomes_a_run(tmp_path: Path, library: str) -> None:
    """Its logits in PEFT, on the base as that library loads it, are those of the run."""
    run = run_of(tmp_path / "run", "vit", {"name": "linear"})
    loaded = load(str(run / "config.yaml"), [], Run)
    if library == "timm":
        model = loaded.config.backbone.build(WORDS).model
        adapter: PeftConfig = SnellConfig(rank=2, sparsity=0.5, target_modules="all-linear", modules_to_save=["head"])
    else:
        formats.export(run, "hf", tmp_path / "hf")  # its backbone is the base's
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf")
        adapter = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    torch.manual_seed(1)
    adapted = get_peft_model(model, adapter)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    imported.bring(loaded, tmp_path / "adapter", tmp_path / "back", tmp_path)
    pictures = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        said = adapted.eval()(pictures)
        theirs = said if library == "timm" else said.logits
        torch.testing.assert_close(formats.serve(tmp_path / "back").logits(pictures), theirs, rtol=1e-6, atol=1e-6)
