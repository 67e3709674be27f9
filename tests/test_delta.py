"""Sparse deltas on plain models of timm and open_clip: the merged weights to the bit, and the base's own afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from conftest import digest, train
from finished_runs import finish
from safetensors.torch import load_file, save_file

import snell_dist
from snell_dist import delta, finished, formats
from snell_dist.config import Plugin, UserError
from snell_dist.delta import DELTA, Entries, Resident, apply_delta
from snell_dist.tensor_files import read_metadata

SHAPE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


def base(run: Path, classes: int = 5) -> torch.nn.Module:
    """timm's own model with the run's base, and a classifier of its own."""
    torch.manual_seed(7)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **SHAPE)
    weights = load_file(finished.read(run).weights or "")
    model.load_state_dict({n: t for n, t in weights.items() if not n.startswith("head")}, strict=False)
    return model.eval()


def state(model: torch.nn.Module) -> str:
    return digest(dict(model.state_dict()))


def merged(run: Path) -> torch.nn.Module:
    return snell_dist.merge(finished.read(run).backbone().model)


def exported(run: Path, to: Path, dtype: str = "float32") -> Path:
    formats.export(run, "delta", to, dtype)
    return to


@pytest.fixture(scope="module")
def file(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(finished, tmp_path_factory.mktemp("delta") / "snell") / DELTA


@pytest.fixture(scope="module")
def other(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another task on the same base: two classes, full sparse tuning of q, v and fc1 alone, few entries."""
    weights = f"backbone.weights={finished.parent.parent / 'demo/pretrain/001/adapter.safetensors'}"
    words = ["method.name=sparse", "method.criterion=magnitude", "method.targets=[q,v,fc1]", "method.sparsity=0.98"]
    out = tmp_path_factory.mktemp("other")
    place = train(out, weights, *words, "data.classes=[5,6]", "optim.lr=0.01").folder
    assert place is not None
    return place


def test_a_plain_model_gets_the_merged_weights_to_the_bit_and_its_own_back(finished: Path, file: Path) -> None:
    model = base(finished)
    before, expected = state(model), dict(merged(finished).state_dict())
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = model(images)
    with apply_delta(model, file) as applied:
        assert applied.classes == ["five", "six", "seven", "eight", "nine"]
        assert model.state_dict().keys() == expected.keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        assert not torch.equal(model(images), plain)
    assert state(model) == before
    applied.remove()  # once more is nothing
    assert state(model) == before
    held = apply_delta(model, file.parent)
    held.remove()
    assert state(model) == before


def test_row_groups_and_single_entries(other: Path, finished: Path, tmp_path: Path) -> None:
    place = exported(other, tmp_path / "few")
    model = base(finished, classes=2)
    untouched = model.state_dict()["blocks.0.attn.qkv.weight"][16:32].clone()
    expected = merged(other).state_dict()
    with apply_delta(model, place):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"][16:32], untouched), "k is not adapted"
    tensors = load_file(place / DELTA)
    assert tensors["blocks.0.mlp.fc1.weight:positions"].dtype == torch.int32, "2 % of entries: indices are smaller"
    assert "blocks.0.mlp.fc2.weight:values" not in tensors


def test_what_a_delta_takes_and_what_is_stored_is_the_smaller_form(file: Path) -> None:
    tensors, read = load_file(file), delta.read(file)
    assert len(read.entries) == 8
    for name, entries in read.entries.items():
        count, numel = len(entries.values), entries.numel
        assert count == pytest.approx(0.1 * numel, abs=2)
        stored = tensors[f"{name}:positions"]
        assert stored.dtype == torch.uint8
        assert len(stored) == -(-numel // 8) < 4 * count
    told = json.loads(read_metadata(file)["shapes"])
    assert told["blocks.1.mlp.fc1.weight"] == [64, 16]
    assert file.stat().st_size < 0.6 * sum(e.numel * 4 for e in read.entries.values())


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 1000])
def test_positions_come_back_from_a_file_at_any_number(count: int, tmp_path: Path) -> None:
    """1003 entries: no multiple of 8, and 1 in 32 is 31.3 of them."""
    dense = torch.zeros(17, 59)
    chosen = torch.randperm(1003, generator=torch.Generator().manual_seed(count))[:count]
    dense.view(-1)[chosen] = torch.randn(count)
    made = delta.Delta({"w": Entries.of(dense)}, {}, "base", "0" * 64, (), {"name": "sparse"}, [])
    delta.write(tmp_path / DELTA, made)
    smaller = torch.uint8 if 4 * count > 126 else torch.int32
    assert load_file(tmp_path / DELTA)["w:positions"].dtype == smaller
    entries = delta.read(tmp_path / DELTA).entries["w"]
    again = torch.zeros(1003)
    again[entries.positions.long()] = entries.values
    assert torch.equal(again.view(17, 59), dense)


def test_open_clips_own_model_takes_a_delta_of_both_towers(finished_clip: Path, tmp_path: Path) -> None:
    run = finished_clip
    place = exported(run, tmp_path / "delta")  # proves itself: zero-shot logits against the run's
    settings: dict[str, Any] = open_clip.get_model_config("ViT-B-32")
    settings["embed_dim"] = 16
    settings["vision_cfg"] |= {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
    settings["text_cfg"] |= {"width": 16, "layers": 1, "heads": 2, "context_length": 16}
    model = open_clip.CLIP(**settings).eval()
    mine = finished.read(run)
    own = mine.base().model.state_dict()
    model.load_state_dict({name.replace("attn.qkv.", "attn.in_proj_"): tensor for name, tensor in own.items()})
    before, expected = state(model), merged(run).state_dict()
    with apply_delta(model, place):
        theirs = model.state_dict()
        for name, tensor in expected.items():
            assert torch.equal(theirs[name.replace("attn.qkv.", "attn.in_proj_")], tensor), name
        assert theirs["logit_scale"] == expected["logit_scale"]
    assert state(model) == before


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
@pytest.mark.parametrize("method", ["snell", "snella", "sparse"])
def test_every_family_takes_the_delta_of_every_sparse_method(family: str, method: str, tmp_path: Path) -> None:
    """Of made-up factors; the export compares logits with the run's, and here weights."""
    smallest = {"name": family, **Plugin("backbones").find(family).smallest}  # type: ignore[attr-defined]
    said = {"sparsity": 0.8} | ({} if method == "sparse" else {"rank": 2})
    run = finish(tmp_path / "run", smallest, {"name": method, **said})
    made = formats.export(run, "delta", tmp_path / "delta")
    assert made.error is not None
    assert made.error < 1e-6
    model = finished.read(run).base().model  # of timm
    before, expected = state(model), merged(run).state_dict()
    with apply_delta(model, made.folder):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
    assert state(model) == before


def test_many_tasks_take_turns_on_one_base(finished: Path, file: Path, other: Path, tmp_path: Path) -> None:
    model = base(finished, classes=1000)
    before, head = state(model), model.head
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = {"five": merged(finished).eval()(images), "two": merged(other).eval()(images)}
    resident = Resident(model)
    resident.add("five", file)
    resident.use("five")
    resident.add("two", exported(other, tmp_path / "two"))
    assert (resident.in_use, resident.tasks) == ("five", ["five", "two"])
    for name in ("five", "two", "two", "five", None, "two"):
        resident.use(name)
        if name is None:
            assert state(model) == before
            assert resident.classes == []
        else:
            torch.testing.assert_close(model(images), expected[name], rtol=1e-5, atol=1e-6)
            assert len(resident.classes) == len(expected[name][0])
    resident.drop("two")
    assert state(model) == before
    assert model.head is head
    resident.use("five")
    with pytest.raises(UserError, match=r"no task 'fiv', did you mean 'five'\? \(there are: five\)"):
        resident.use("fiv")
    with pytest.raises(UserError, match="there is a task 'five' already"):
        resident.add("five", file)
    with pytest.raises(UserError, match="carries a delta already: remove that first, or swap with Resident"):
        apply_delta(model, file)
    assert resident.in_use == "five"


def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(finished: Path, file: Path) -> None:
    model = base(finished, classes=7)
    before = state(model)
    with pytest.raises(UserError, match=r"head.weight is \[7, 16\] in this model, and \[5, 16\] for 5 classes"):
        apply_delta(model, file)
    with apply_delta(model, file, replace_head=True):
        assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 5)
        with pytest.raises(UserError, match="carries a delta already"):
            apply_delta(model, file)
    assert state(model) == before
    headless = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SHAPE)
    headless.load_state_dict(model.state_dict(), strict=False)
    with apply_delta(headless, file, replace_head=True):
        assert headless(torch.zeros(1, 1, 8, 8)).shape == (1, 5)
    assert headless(torch.zeros(1, 1, 8, 8)).shape == (1, 16)
    with torch.no_grad():
        model.norm.bias[0] += 1
    with pytest.raises(
        UserError, match=r"is for vit_tiny.* with weights \w{12} in float32, and this model has weights"
    ):
        apply_delta(model, file)
    with pytest.raises(UserError, match="and this model holds bfloat16"):
        apply_delta(base(finished).bfloat16(), file)
    other_head = base(finished)
    other_head.head = torch.nn.Sequential(torch.nn.Linear(16, 5))
    kept = state(other_head)
    with pytest.raises(UserError, match="head cannot be replaced"):
        apply_delta(other_head, file, replace_head=True)
    resident = Resident(other_head)
    with pytest.raises(UserError, match="head cannot be replaced"):
        resident.add("five", file)
    assert resident.tasks == []
    assert state(other_head) == kept


@pytest.mark.parametrize(
    "hurt",
    [
        lambda t: t | {"blocks.0.attn.qkv.weight:values": t["blocks.0.attn.qkv.weight:values"][:-1]},
        lambda t: t | {"blocks.0.attn.qkv.weight:positions": t["blocks.0.attn.qkv.weight:positions"].repeat(2)},
        lambda t: t | {"blocks.0.attn.qkv.weight:positions": torch.arange(77, dtype=torch.int32) * 11},
        lambda t: t | {"blocks.0.attn.qkv.weight:positions": torch.arange(77, dtype=torch.int32) - 1},
        lambda t: t | {"blocks.0.attn.qkv.weight:positions": torch.zeros(77, dtype=torch.int32)},
        lambda t: {name: tensor for name, tensor in t.items() if name != "blocks.0.attn.qkv.weight:positions"},
    ],
)
def test_a_damaged_file_is_refused_before_anything_is_touched(hurt: Any, file: Path, tmp_path: Path) -> None:
    tensors = load_file(file)
    tensors["blocks.0.attn.qkv.weight:values"] = tensors["blocks.0.attn.qkv.weight:values"][:77].clone()
    save_file(hurt(tensors), tmp_path / DELTA, read_metadata(file))
    with pytest.raises(UserError, match=r"delta.safetensors: damaged: .*blocks\.0\.attn\.qkv\.weight"):
        delta.read(tmp_path / DELTA)


def test_other_files_are_no_deltas(finished: Path, file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a delta file of this version"):
        delta.read(finished / "adapter.safetensors")
    with pytest.raises(UserError, match="no such file"):
        apply_delta(torch.nn.Linear(1, 1), tmp_path)
    save_file({}, tmp_path / DELTA, read_metadata(file) | {"shapes": "{"})
    with pytest.raises(UserError, match="damaged: what it says of itself cannot be read"):
        delta.read(tmp_path / DELTA)
    (tmp_path / DELTA).write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        delta.read(tmp_path / DELTA)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.name=lora"], "method lora changes every entry: choose timm, open_clip or peft"),
        (["method.sparsity=0"], "method snell changes every entry"),
        (["method.name=snella", "method.sparsity=0.01"], "9.% of the entries change: choose timm or open_clip"),
        (["method.name=full"], "method full trains every weight"),
        (["method.name=prompt"], "method prompt adds modules"),
        (
            ["precision.frozen=bfloat16", "precision.compute=bfloat16"],
            "belongs to a base that was rounded to bfloat16: choose timm or open_clip",
        ),
    ],
)
def test_what_is_no_sparse_delta_is_refused_in_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    run = train(tmp_path, *words, "train.steps=1").folder
    assert run is not None
    with pytest.raises(UserError, match=said):
        exported(run, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_biases_alone_are_a_delta_too_and_half_precision_halves_the_values(tmp_path: Path, file: Path) -> None:
    run = train(tmp_path, "method.name=bias", "train.steps=1").folder
    assert run is not None
    place = exported(run, tmp_path / "bias")
    assert delta.read(place / DELTA).entries == {}
    assert snell_dist.load(place, device="cpu").classes == ["five", "six", "seven", "eight", "nine"]


def test_half_precision_halves_the_values(finished: Path, file: Path, tmp_path: Path) -> None:
    half = exported(finished, tmp_path / "half", "bfloat16") / DELTA
    whole, short = load_file(file), load_file(half)
    for name, tensor in whole.items():
        assert torch.equal(short[name], tensor.bfloat16() if tensor.is_floating_point() else tensor)
