"""The code that readers copy: README's snippets and the examples, run as they stand."""

import runpy
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT
from pages import blocks

pytestmark = pytest.mark.xdist_group("code of the docs")  # one process imports transformers and PEFT for all
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))
THROUGH_PEFT, PLAIN = (block.text for block in blocks(ROOT / "README.md") if block.language == "python")


def test_readme_adapts_a_model_of_transformers_through_peft() -> None:
    names: dict = {}
    exec(THROUGH_PEFT, names)
    model = names["model"]
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    head = sum(count for name, count in trained.items() if "classifier" in name)
    assert head == 768 * 100 + 100
    assert sum(trained.values()) - head == 12 * 8 * (4 * 1536 + 2 * 3840), "rank 8 of q, k, v, proj, fc1, fc2"


def test_readme_snippets_are_five_lines() -> None:
    assert [sum(len(line) > 0 for line in text.splitlines()) for text in (THROUGH_PEFT, PLAIN)] == [5, 5]


def test_readme_adapts_any_model_and_merges_it() -> None:
    adapt, merge = PLAIN.split("...  # your own loop\n")
    names: dict = {}
    exec(adapt, names)
    model = names["model"].eval()
    assert sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head")) == (
        12 * 8 * (4 * 1536 + 2 * 3840)
    )
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        exec(merge, names)
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == timm.create_model("vit_base_patch16_224", num_classes=100).state_dict().keys()


def test_the_page_on_peft_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = next(block.text for block in blocks(ROOT / "docs/howto/peft.md") if block.language == "python")
    names: dict = {}
    exec(code, names)
    assert type(names["plain"]) is type(names["base"]) and (tmp_path / "adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_runs(example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = example.read_text()
    assert text.startswith("# %% [markdown]\n# # ") and text.count("\n# %%\n") > 2, "cells"
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(example), run_name="__main__")
    match example.stem:
        case "peft_vit":
            assert names["same"] and names["error"] < 1e-6
            assert names["accuracy"] > 0.6, "it learns"
        case "many_tasks":
            assert names["same"] and min(names["accuracy"].values()) > 0.6
        case "memory_before_you_train":
            assert names["said"] == pytest.approx(names["measured"], rel=2e-3)
            assert not names["made"].fits(names["made"].own) and names["made"].fits(names["made"].choice)
