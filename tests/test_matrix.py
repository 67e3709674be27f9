"""Every family with every method on every kind of target: a file in backbones/ or methods/ is tested by being there.

The models are each family's `smallest`, the images real digits, the path that of a run: build, step, merge.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import digest, saved

from snell_dist import methods
from snell_dist.anatomy import linears
from snell_dist.backbones import section
from snell_dist.build import Built, build
from snell_dist.config import Plugin, UserError, check
from snell_dist.feed import Feed
from snell_dist.methods import LinearMethod
from snell_dist.run_config import Run
from snell_dist.train import check_gradients

FAMILIES, METHODS = Plugin("backbones").names(), Plugin("methods").names()
ON_LAYERS = [name for name in METHODS if issubclass(Plugin("methods").find(name), LinearMethod)]
CPU = torch.device("cpu")


@functools.cache
def targets_of(family: str) -> dict[str, list[str]]:
    """All layers, one part, every other part, and the last block alone."""
    with torch.device("meta"):
        backbone = section(family, **smallest(family)).make(5)
    parts = list(dict.fromkeys(part for target in backbone.targets for part in target.parts))
    return {"all": ["*"], "one": parts[:1], "some": parts[::2], "last": ["blocks.-1:"]}


def smallest(family: str) -> dict[str, Any]:
    return Plugin("backbones").find(family).smallest


def fits(family: str, method: str) -> bool:
    """Prompts cannot join the images of a convolution, nor windows."""
    return method != "prompt" or family in ("vit", "clip")


PAIRS = [(f, m) for f in FAMILIES for m in METHODS if fits(f, m)]
CASES = [(f, m, w) for f, m in PAIRS for w in (targets_of(f) if m in ON_LAYERS else ["all"])]


def configured(
    family: str, method: str, where: str = "all", options: dict[str, Any] | None = None, **sections: Any
) -> Run:
    chosen = {"name": method, **({"targets": targets_of(family)[where]} if method in ON_LAYERS else {})}
    tree = {
        "backbone": {"name": family, **smallest(family)},
        "method": chosen | (options or {}),
        "data": {"name": "digits", "classes": [5, 6, 7, 8, 9], "image_size": 32, "channels": 3, "batch_size": 6},
        "optim": {"lr": 1e-2, "eps": 1e-16},  # ConvNeXt's new layer scales make gradients of 1e-9
        "train": {"steps": 3},
    }
    return check(tree | sections, Run)


def built(config: Run) -> Built:
    return build(config, None, CPU)


def steps(config: Run, made: Built, count: int = 3) -> list[float]:
    """Steps of training as the loop makes them; the loss of each."""
    made.engine.model.train()
    losses = []
    for step in range(count):
        torch.manual_seed(step)
        batches = Feed(made.splits.train, config.data, 0, step, step + 1).step()
        losses.append(made.task.step(made.engine, batches).item())
        if step == 0:
            check_gradients(made)
        made.engine.step(config.optim.lr)
        made.task.after_step(made.engine)
    return losses


def trained(made: Built) -> dict[str, torch.Tensor]:
    parameters = dict(made.engine.model.named_parameters())
    return {name: parameters[name].detach().clone() for name in made.trainable}


def frozen(made: Built) -> str:
    """SHA-256 of everything that shall not move: the state dict without what trains."""
    return digest({k: v for k, v in made.engine.model.state_dict().items() if k not in made.trainable})


@pytest.mark.parametrize(("family", "method", "where"), CASES)
def test_what_trains_moves_and_what_is_frozen_keeps_its_bytes(family: str, method: str, where: str) -> None:
    config = configured(family, method, where)
    made = built(config)
    bytes_before, before = frozen(made), trained(made)
    steps(config, made)
    assert frozen(made) == bytes_before
    still = [name for name, tensor in trained(made).items() if torch.equal(tensor, before[name])]
    assert not still


@pytest.mark.parametrize(("family", "method", "where"), CASES)
def test_merged_and_adapted_models_give_the_same_logits(family: str, method: str, where: str) -> None:
    config = configured(family, method, where)
    made = built(config)
    plain = built(configured(family, "full"))
    steps(config, made)
    model = made.engine.model.eval()
    images = torch.stack([made.splits.test[i][0] for i in range(4)])
    with torch.no_grad():
        logits = model(images)
        if any(not getattr(module, "mergeable", True) for module in model.modules()):
            with pytest.raises(UserError, match="no weight can hold"):
                methods.merge(model)
            torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
            return
        methods.merge(model)
        torch.testing.assert_close(model(images), logits, rtol=1e-5, atol=1e-5)
    assert model.state_dict().keys() == plain.engine.model.state_dict().keys()
    assert linears(model) == linears(plain.engine.model)


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_recomputing_changes_no_bit(family: str, method: str) -> None:
    """With dropout and stochastic depth, whose draws must be the same the second time."""
    fields = Plugin("methods").find(method).model_fields
    noisy = {"dropout": 0.2} if "dropout" in fields else {}
    known = Plugin("backbones").find(family).model_fields
    backbone = {"name": family, **smallest(family), **({"drop_path": 0.3} if "drop_path" in known else {})}
    results = []
    for remat in ({}, {"policy": "block"}, {"policy": "block", "every": 2}, {"policy": "selective"}):
        config = configured(family, method, options=noisy, backbone=backbone, remat=remat)
        made = built(config)
        results.append((steps(config, made), trained(made)))
    for losses, weights in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(weights[name], tensor) for name, tensor in results[0][1].items())


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_half_precision_trains_float32_parameters(family: str, method: str, stored: str) -> None:
    exact = configured(family, method)
    wanted = steps(exact, built(exact), 1)[0]
    config = configured(family, method, precision={"compute": "bfloat16", "frozen": stored})
    made = built(config)
    before = trained(made)
    losses = steps(config, made)
    assert losses[0] == pytest.approx(wanted, rel=0.03)
    for name, parameter in made.engine.model.named_parameters():
        matrix = name.endswith(".weight") and parameter.ndim > 1 and name not in made.trainable
        assert parameter.dtype == (getattr(torch, stored) if matrix else torch.float32), name
    assert not [name for name, tensor in trained(made).items() if torch.equal(tensor, before[name])]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_run_saves_what_trains_and_goes_on_exactly(family: str, method: str, tmp_path: Path) -> None:
    config = configured(family, method)
    made = built(config)
    steps(config, made, 2)
    found = saved(tmp_path, made.engine.state(), 2)
    losses = steps(config, made)
    again = built(config)
    again.engine.load_state(found)
    assert steps(config, again) == losses
    assert all(torch.equal(tensor, trained(made)[name]) for name, tensor in trained(again).items())


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", ["int8", "nf4"])
@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_packed_base_trains_and_merges(family: str, method: str, stored: str, compute: str) -> None:
    """bitsandbytes on the CPU: the frozen linear layers in 8 or 4 bits, all else as usual."""
    exact = configured(family, method)
    wanted = steps(exact, built(exact), 1)[0]
    config = configured(family, method, precision={"compute": compute, "frozen": stored})
    made = built(config)
    bytes_before, before = frozen(made), trained(made)
    losses = steps(config, made)
    assert losses[0] == pytest.approx(wanted, rel=0.03)
    assert frozen(made) == bytes_before
    assert not [name for name, tensor in trained(made).items() if torch.equal(tensor, before[name])]
    model = made.engine.model.eval()
    packed = {name: m for name, m in model.named_modules() if getattr(m, "packing", None) is not None}
    shares = {
        n: m.weight.numel() * m.weight.element_size() / (m.in_features * m.out_features) for n, m in packed.items()
    }
    assert set(shares.values()) == (set() if method == "full" else {1.0 if stored == "int8" else 0.5})
    if compute == "bfloat16" or any(not getattr(module, "mergeable", True) for module in model.modules()):
        return
    images = torch.stack([made.splits.test[i][0] for i in range(4)])
    with torch.no_grad():
        logits = model(images)
        methods.merge(model)
        torch.testing.assert_close(model(images), logits, rtol=1e-5, atol=1e-5)
    assert all(type(model.get_submodule(name)) is torch.nn.Linear for name in packed)


@pytest.mark.parametrize("family", [f for f in FAMILIES if not fits(f, "prompt")])
def test_prompts_are_refused_where_blocks_take_no_tokens(family: str) -> None:
    with pytest.raises(UserError, match="take no plain tokens") as caught:
        built(configured(family, "prompt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [f for f in FAMILIES if "text_width" in Plugin("backbones").find(f).model_fields])
def test_both_towers_train_by_pairs(family: str, method: str, stored: str) -> None:
    if method == "linear":
        with pytest.raises(UserError, match=r"method\.train"):
            built(configured(family, method, task={"name": "contrastive"}))
        return
    compute = "bfloat16" if stored == "bfloat16" else "float32"
    precision, remat = {"compute": compute, "frozen": stored}, {"policy": "block"}
    config = configured(family, method, task={"name": "contrastive"}, precision=precision, remat=remat)
    made = built(config)
    bytes_before, before = frozen(made), trained(made)
    steps(config, made)
    assert frozen(made) == bytes_before
    assert not [name for name, tensor in trained(made).items() if torch.equal(tensor, before[name])]
