"""Every file in methods/ is tested by being there; what is particular to one method has a test of its own."""

import pytest
import timm
import torch
from torch import nn

import snell_dist
from snell_dist.config import ConfigError, Plugin, UserError
from snell_dist.methods import adapted_layers

METHODS = Plugin("methods").names()


def vit() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **options).eval()


def options(method: str) -> dict:
    return {"also_train": ["head"]} if method not in ("full", "linear") else {}


def step(model: nn.Module) -> None:
    """One step of training that makes every factor leave its start."""
    torch.manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(3):
        model(torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_every_trainable_tensor_trains_and_merging_changes_no_logit(method: str) -> None:
    model, base = vit(), vit()
    snell_dist.adapt(model, method, **options(method))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.clone() for name, p in model.named_parameters()}
    step(model)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trainable
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        snell_dist.merge(model)
        torch.testing.assert_close(model(images), logits, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == base.state_dict().keys(), "merged, the model has timm's own keys"
    assert not adapted_layers(model)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("full", "linear")])
def test_adapted_layers_keep_the_backbones_keys_and_parameter_objects(method: str) -> None:
    model = vit()
    base = dict(model.named_parameters())
    snell_dist.adapt(model, method, rank=4)
    adapted = dict(model.named_parameters())
    assert all(adapted[name] is parameter for name, parameter in base.items())
    names = {name for name, _ in adapted_layers(model)}
    assert len(names) == 2 * 4 + 1, "qkv, proj, fc1, fc2 of two blocks, and the head that nothing excluded"
    for name, layer in adapted_layers(model):
        assert layer.groups == (3 if name.endswith("qkv") else 1)
        assert layer.factor_names


@pytest.mark.parametrize("method", ["snell", "lora"])
def test_a_fused_qkv_equals_three_layers_with_the_same_factors(method: str) -> None:
    torch.manual_seed(0)
    fused = nn.Sequential(nn.Linear(12, 36))
    separate = [nn.Sequential(nn.Linear(12, 12)) for _ in range(3)]
    snell_dist.adapt(fused, method, rank=4, groups={"0": 3})
    with torch.no_grad():
        fused[0].b.normal_()
        for g, one in enumerate(separate):
            snell_dist.adapt(one, method, rank=4)
            one[0].weight.copy_(fused[0].weight[12 * g : 12 * (g + 1)])
            one[0].bias.copy_(fused[0].bias[12 * g : 12 * (g + 1)])
            one[0].a.copy_(fused[0].a[:, 4 * g : 4 * (g + 1)])
            one[0].b.copy_(fused[0].b[12 * g : 12 * (g + 1)])
        x = torch.randn(5, 12)
        torch.testing.assert_close(fused(x), torch.cat([one(x) for one in separate], dim=-1))


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


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("full", "linear")])
def test_an_adapted_model_compiles_in_one_graph(method: str) -> None:
    model = snell_dist.adapt(vit(), method, rank=4, also_train=["head"])
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second call finds what the layers remember of the first
        torch.testing.assert_close(compiled(images), model(images))
        compiled(images).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_lora_agrees_with_peft() -> None:
    import peft

    base = nn.Sequential(nn.Linear(20, 30))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    ours = nn.Sequential(nn.Linear(20, 30))
    ours[0].load_state_dict(layer.base_layer.state_dict())
    snell_dist.adapt(ours, "lora", rank=4, alpha=8.0)
    with torch.no_grad():
        ours[0].a.copy_(layer.lora_A["default"].weight.t())
        ours[0].b.copy_(layer.lora_B["default"].weight)
    x = torch.randn(6, 20)
    torch.testing.assert_close(ours(x), theirs(x))


def test_snells_parameters_are_the_papers_counts() -> None:
    """Table 1's SNELL-8 on ViT-B/16: 1,327,104 factors (spec/fidelity.md, section 2), on the meta device."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
        snell_dist.adapt(model, "snell", rank=8)
    factors = sum(layer.a.numel() + layer.b.numel() for _, layer in adapted_layers(model))
    assert factors == 8 * 165_888


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
