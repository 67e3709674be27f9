"""`adapt` and `merge` on any model, and what is particular to one method; the rest is in test_matrix.py."""

from typing import Any

import peft
import pytest
import timm
import torch
from torch import Tensor, nn

import snell_dist
from snell_dist.config import ConfigError, Plugin, UserError
from snell_dist.methods import LinearMethod, adapted_layers

METHODS = Plugin("methods").names()
ON_LAYERS = [name for name in METHODS if issubclass(Plugin("methods").find(name), LinearMethod)]


def vit() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def adapted(model: nn.Module, method: str, **options: Any) -> nn.Module:
    """With training images for a method that looks before it chooses."""
    losses = [lambda: model(torch.randn(4, 3, 32, 32)).square().mean()]
    return snell_dist.adapt(model, method, losses=losses, **options)


@pytest.mark.parametrize("method", ON_LAYERS)
def test_adapted_layers_keep_the_backbones_keys_and_parameter_objects(method: str) -> None:
    model = vit()
    base = dict(model.named_parameters())
    fields = Plugin("methods").find(method).model_fields
    adapted(model, method, **({"rank": 4} if "rank" in fields else {}))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in base.items())
    names = {name for name, _ in adapted_layers(model)}
    if fields["targets"].default == ["*"]:
        assert len(names) == 2 * 4 + 1, "qkv, proj, fc1, fc2 of two blocks, and the head that nothing excluded"
    for name, layer in adapted_layers(model):
        assert layer.groups == (3 if name.endswith("qkv") else 1)
        assert layer.factor_names


@pytest.mark.parametrize("method", METHODS)
def test_an_adapted_model_compiles_in_one_graph(method: str) -> None:
    torch._dynamo.reset()  # its limit of recompilations counts over all tests
    model = adapted(vit(), method, **({} if method in ("full", "linear") else {"also_train": ["head"]}))
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second call finds what the layers remember of the first
        torch.testing.assert_close(compiled(images), model(images))
        compiled(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("chosen", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("snell", {"sparsity": 0.5}),
        ("snell", {"sparsity": 0.5, "kernel": "rbf"}),
        ("snella", {"sparsity": 0.3}),
        ("lora", {}),
        ("lora", {"dora": True}),
        ("lora", {"scaling": "rslora", "alpha": 3.0}),
    ],
)
def test_parts_of_a_fused_weight_equal_layers_of_their_own(method: str, options: dict[str, Any], chosen: str) -> None:
    """The same factors in separate q, k and v layers give the same outputs, gradients and merged weights."""
    torch.manual_seed(0)
    fused = nn.Module()
    fused.qkv = nn.Linear(12, 36)
    fused.forward = lambda x: fused.qkv(x)
    apart = {part: nn.Linear(12, 12) for part in "qkv"}
    with torch.no_grad():
        for g, layer in enumerate(apart.values()):
            layer.weight.copy_(fused.qkv.weight[12 * g : 12 * (g + 1)])
            layer.bias.copy_(fused.qkv.bias[12 * g : 12 * (g + 1)])
    snell_dist.adapt(fused, method, rank=4, targets=list(chosen), **options)
    own = {part: snell_dist.adapt(nn.Sequential(apart[part]), method, rank=4, **options)[0] for part in chosen}
    whole = fused.qkv
    with torch.no_grad():
        whole.b.normal_()
        for g, layer in enumerate(own.values()):
            for name in layer.factor_names:
                given, span = whole.get_parameter(name), slice(4 * g, 4 * (g + 1))
                rows = given.chunk(len(own))[g] if name != "a" else given[:, span]
                layer.get_parameter(name).copy_(rows)
    layers = [own.get(part, apart[part]) for part in "qkv"]
    x = torch.randn(5, 12, requires_grad=True)
    up = torch.randn(5, 36)
    y, expected = whole(x), torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(y, expected)
    gx, ga, gb = torch.autograd.grad((y * up).sum(), [x, whole.a, whole.b])
    inputs = [x, *(layer.a for layer in own.values()), *(layer.b for layer in own.values())]
    other = torch.autograd.grad((expected * up).sum(), inputs)
    torch.testing.assert_close(gx, other[0])
    torch.testing.assert_close(ga, torch.cat(other[1 : 1 + len(own)], 1))
    torch.testing.assert_close(gb, torch.cat(other[1 + len(own) :]))
    merged = snell_dist.merge(fused).qkv
    torch.testing.assert_close(merged(x), y)
    for g, part in enumerate("qkv"):
        if part not in chosen:
            assert torch.equal(merged.weight[12 * g : 12 * (g + 1)], apart[part].weight), "not a bit of it moved"


@pytest.mark.parametrize("kernel", ["distance", "linear", "sigmoid", "rbf"])
def test_every_kernel_trains_with_its_scalars_and_merges(kernel: str) -> None:
    torch.manual_seed(0)
    model = snell_dist.adapt(
        nn.Sequential(nn.Linear(12, 18)), "snell", rank=4, sparsity=0.5, kernel=kernel, groups={"0": 3}
    )
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    scalars = set() if kernel in ("distance", "linear") else {"0.alpha", "0.beta", "0.gamma"}
    assert names == {"0.a", "0.b"} | scalars
    x = torch.randn(5, 12)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
    before = model(x).detach()
    torch.testing.assert_close(snell_dist.merge(model)(x), before)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"alpha": 8.0}, {"lora_alpha": 8}),
        ({"alpha": 8.0, "scaling": "rslora"}, {"lora_alpha": 8, "use_rslora": True}),
        ({"alpha": 8.0, "dora": True}, {"lora_alpha": 8, "use_dora": True}),
    ],
)
def test_lora_agrees_with_peft(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Outputs, gradients, parameter counts and merged weights."""
    torch.manual_seed(0)
    given = {"r": 4, "lora_alpha": 4, "target_modules": ["0"], "lora_dropout": 0.0} | theirs
    other = peft.get_peft_model(nn.Sequential(nn.Linear(20, 30)), peft.LoraConfig(**given))
    layer = other.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    model = nn.Sequential(nn.Linear(20, 30))
    model[0].load_state_dict(layer.base_layer.state_dict())
    snell_dist.adapt(model, "lora", rank=4, **ours)
    pairs = {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
    if ours.get("dora"):
        pairs["m"] = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(model[0].get_parameter("m").flatten(), pairs["m"])
    with torch.no_grad():
        model[0].a.copy_(pairs["a"].t())
        model[0].b.copy_(pairs["b"])
    x, up = torch.randn(6, 20), torch.randn(6, 30)
    torch.testing.assert_close(model(x), other(x))
    (model(x) * up).sum().backward()
    (other(x) * up).sum().backward()
    for name, parameter in pairs.items():
        mine = model[0].get_parameter(name).grad
        torch.testing.assert_close(mine.t() if name == "a" else mine.view_as(parameter), parameter.grad)
    assert _trains(model) == _trains(other)
    torch.testing.assert_close(snell_dist.merge(model)[0].weight, other.merge_and_unload()[0].weight)


def _trains(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_released_lora_starts_with_another_delta() -> None:
    model = snell_dist.adapt(nn.Sequential(nn.Linear(64, 64)), "lora", init="released")
    assert 0.015 < model[0].b.std() < 0.025


@pytest.mark.parametrize("budget", ["matrix", "global"])
@pytest.mark.parametrize("criterion", ["sensitivity", "magnitude"])
def test_sparse_masks_hold_the_budget_and_the_largest_scores(criterion: str, budget: str) -> None:
    """Against a plain reading of the rule: squared gradients summed over batches, or the size of the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 10))
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in ("0", "2")}
    batches = [torch.randn(8, 20) for _ in range(3)]
    scores: dict[str, Tensor] = {name: weight.abs() for name, weight in weights.items()}
    if criterion == "sensitivity":
        scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for batch in batches:
            model.zero_grad()
            model(batch).square().sum().backward()
            for name in scores:
                scores[name] += model.get_submodule(name).weight.grad.square()
    snell_dist.adapt(
        model, "sparse", sparsity=0.9, criterion=criterion, budget=budget,
        losses=[lambda batch=batch: model(batch).square().sum() for batch in batches],
    )  # fmt: skip
    masks = {name: model.get_submodule(name).get_buffer("mask") for name in weights}
    sizes = {name: int(mask.sum()) for name, mask in masks.items()}
    assert sizes == {"0": 60, "2": 30} if budget == "matrix" else sum(sizes.values()) == 90
    together = torch.cat([score.flatten() for score in scores.values()]).sort(descending=True).values
    for name, mask in masks.items():
        ordered = scores[name].flatten().sort(descending=True).values
        least = together[89] if budget == "global" else ordered[sizes[name] - 1]
        assert torch.equal(mask, scores[name] >= least)


def test_sparse_moves_the_chosen_entries_only() -> None:
    model = adapted(vit(), "sparse", sparsity=0.95, targets=["fc1"], also_train=["head"])
    before = {name: layer.weight.clone() for name, layer in adapted_layers(model)}
    masks = {name: layer.get_buffer("mask") for name, layer in adapted_layers(model)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    snell_dist.merge(model)
    for name, mask in masks.items():
        moved = model.get_submodule(name).weight != before[name]
        assert torch.equal(moved, mask)


def test_sparse_without_images_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="pass `losses`, or criterion='magnitude'"):
        snell_dist.adapt(vit(), "sparse")


def test_prompts_change_the_output_and_leave_the_tokens() -> None:
    torch.manual_seed(0)
    model, x = vit(), torch.randn(2, 3, 32, 32)
    lengths: list[int] = []
    model.norm.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    before = model(x)
    snell_dist.adapt(model, "prompt", count=3, also_train=["head"])
    assert not torch.allclose(model(x), before)
    assert lengths == [5, 5], "four patches and the class token"
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, depths=[1, 1, 1, 1])
    snell_dist.adapt(swin, "prompt", count=3, also_train=["head"])
    with pytest.raises(UserError, match="no plain tokens"):
        swin(x)


def test_adapters_start_as_the_identity_unless_released() -> None:
    x = torch.randn(2, 3, 32, 32)
    before = vit()(x)
    torch.testing.assert_close(snell_dist.adapt(vit(), "adapter")(x), before, rtol=0, atol=0)
    assert not torch.equal(snell_dist.adapt(vit(), "adapter", init="released")(x), before)


def test_adapt_complains_in_one_line() -> None:
    with pytest.raises(ConfigError, match="did you mean 'snell'"):
        snell_dist.adapt(vit(), "snel")
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        snell_dist.adapt(vit(), "snell", rnak=8)
    with pytest.raises(ConfigError, match="matches no linear layer"):
        snell_dist.adapt(vit(), "snell", targets=["nothing"])
    with pytest.raises(ConfigError, match="larger than a layer of 48 x 7"):
        snell_dist.adapt(vit(), "snell")
    with pytest.raises(UserError, match="nothing would train"):
        snell_dist.adapt(nn.Sequential(nn.ReLU()), "full")


def test_released_regularisation_leaves_projs_input_alone() -> None:
    """Dropout where the configuration says, and drop path for q, k and v apart; nothing of it in evaluation."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2, num_classes=3)
    torch.manual_seed(0)
    snell_dist.adapt(
        model,
        "snell",
        rank=4,
        also_train=["head"],
        dropout=0.5,
        dropout_on=["q", "k", "v", "fc1", "fc2"],
        drop_path=0.5,
    )
    block = model.blocks[0]
    x = torch.randn(64, 5, 24)
    proj, qkv = block.attn.proj, block.attn.qkv
    assert (proj.method.dropout, qkv.method.dropout, block.mlp.fc1.method.dropout) == (0.0, 0.5, 0.5)
    with torch.no_grad():
        base = torch.nn.functional.linear(x, proj.weight, proj.bias)
        delta = (proj.train()(x) - base).flatten(1)
        whole = 2 * (proj.eval()(x) - base).flatten(1)
        kept = delta.abs().amax(1) > 0
        assert 10 < kept.sum() < 54
        torch.testing.assert_close(delta[kept], whole[kept], atol=1e-5, rtol=1e-4)
        base = torch.nn.functional.linear(x, qkv.weight, qkv.bias)
        parts = (qkv.train()(x) - base).unflatten(-1, (3, -1)).abs().amax((1, 3)) > 0
        assert len({tuple(row) for row in parts.tolist()}) == 8, "every combination of q, k and v occurs"
        assert torch.equal(qkv.eval()(x), qkv(x))
    with pytest.raises(ConfigError, match=r"method\.dropout_on = 'w': matches no linear layer"):
        snell_dist.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), "snell", rank=4, dropout_on=["w"])
