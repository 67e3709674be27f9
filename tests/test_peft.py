"""SNELL as a method of Hugging Face PEFT, on small random models of the real classes.

Oracles: the formulas in float64 (tests/ops/naive.py), the harness's own layers on the same weights, PEFT's LoRA on the
same calls, and the libraries' own loaders.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from ops import naive
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file
from torch import Tensor, nn

import snell_dist
from snell_dist.ops import KERNELS
from snell_dist.peft import SnellConfig, SnellLinear, SnellParameter

IMAGES, TOKENS = torch.randn(2, 3, 16, 16, generator=torch.manual_seed(0)), torch.arange(1, 17).view(2, 8)
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {"image_size": 16, "patch_size": 4}


def vit() -> nn.Module:
    config = transformers.ViTConfig(**SMALL, **PICTURE, intermediate_size=48, num_labels=5)
    return transformers.ViTForImageClassification(config)


def dinov2() -> nn.Module:
    return transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**SMALL, **PICTURE, mlp_ratio=2, num_labels=5)
    )


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=16, patch_size=2, num_labels=5
    )
    return transformers.SwinForImageClassification(config)


def clip() -> nn.Module:
    text = SMALL | {"vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 16, "intermediate_size": 48}
    vision = SMALL | PICTURE | {"intermediate_size": 48}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, vocab_size=64, intermediate_size=48, num_key_value_heads=1)
    )


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=24, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2, img_size=16, patch_size=4, num_classes=5
    )


Run = Callable[[nn.Module], Tensor]
MODELS: dict[Callable[[], nn.Module], tuple[Run, dict[str, Any]]] = {
    vit: (lambda m: m(IMAGES).logits, {"modules_to_save": ["classifier"], "parameters_to_save": ["*cls_token"]}),
    dinov2: (lambda m: m(IMAGES).logits, {"modules_to_save": ["classifier"], "parameters_to_save": ["*.norm1.bias"]}),
    swin: (lambda m: m(IMAGES).logits, {"modules_to_save": ["classifier"]}),
    clip: (lambda m: m(pixel_values=IMAGES, input_ids=TOKENS).logits_per_image, {}),
    llama: (lambda m: m(input_ids=TOKENS).logits, {}),
    gpt2: (lambda m: m(input_ids=TOKENS).logits, {"parameters_to_save": ["*.c_attn.bias"]}),
    timm_vit: (lambda m: m(IMAGES), {"modules_to_save": ["head"], "parameters_to_save": ["cls_token", "pos_embed"]}),
}


def made(make: Callable[[], nn.Module], state: dict[str, Tensor] | None = None) -> nn.Module:
    """A frozen model, of the same weights every time."""
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    if state is not None:
        model.load_state_dict(state)
    return model


def config(**said: Any) -> SnellConfig:
    return SnellConfig(**{"rank": 4, "sparsity": 0.5, "exclude_modules": ["head", "classifier"], **said})


def moved(model: nn.Module, by: float = 0.3) -> nn.Module:
    """Every factor somewhere else, so that an adapter does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator), alpha=by)
    return model


def relative(one: Tensor, two: Tensor) -> float:
    return ((one - two).abs().max() / two.abs().max()).item()


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_is_adapted_trained_saved_loaded_and_merged(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    run, said = MODELS[make]
    base = made(make)
    before, state = run(base), {name: t.clone() for name, t in base.state_dict().items()}
    model = get_peft_model(base, SnellConfig(rank=4, sparsity=0.5, target_modules="all-linear", **said))
    adapted = [name for name, module in model.named_modules() if isinstance(module, SnellLinear)]
    assert len(adapted) >= 8 and not any("head" in name or "classifier" in name for name in adapted)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    run(model.train()).square().mean().backward()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trains
    optimizer.step()
    after = run(model.eval())
    assert relative(after, before) > 1e-3
    with model.disable_adapter():
        assert torch.equal(run(model), before)

    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == len(trains) and sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]
    assert torch.equal(run(PeftModel.from_pretrained(made(make, state), tmp_path).eval()), after)

    model.merge_adapter()
    assert relative(run(model), after) < 1e-6
    model.unmerge_adapter()
    assert torch.equal(run(model), after)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(made(make)) and set(merged.state_dict()) == set(state)
    assert relative(run(merged), after) < 1e-6


@pytest.mark.parametrize("kernel", sorted({*KERNELS} - {"snella"}))
@pytest.mark.parametrize("sparsify", ["released", "paper", "hard"])
def test_a_layer_computes_the_formulas(kernel: str, sparsify: str) -> None:
    """Two active adapters of a fused layer, in float64 by hand."""
    linear, groups = nn.Linear(10, 12), 3
    said = {"target_modules": ["0"], "kernel": kernel, "sparsify": sparsify, "groups": {"0": groups}}
    model = get_peft_model(nn.Sequential(linear), SnellConfig(rank=4, sparsity=0.7, **said))
    model.add_adapter("other", SnellConfig(rank=2, sparsity=0.25, **said))
    model.base_model.set_adapter(["default", "other"])
    moved(model, 0.5)
    x, up = torch.randn(5, 10, requires_grad=True), torch.randn(5, 12)
    y = model(x)
    y.backward(up)
    layer = model.base_model.model[0]
    whole, gx = x.detach().double().numpy() @ np.float64(linear.weight.T) + np.float64(linear.bias.detach()), 0
    gx = up.double().numpy() @ np.float64(linear.weight)
    for adapter, sparsity in (("default", 0.7), ("other", 0.25)):
        a, b = layer.snell_a[adapter], layer.snell_b[adapter]
        scalars = {name: getattr(layer, f"snell_{name}") for name in ("alpha", "beta", "gamma")}
        params = {name: float(those[adapter][0]) for name, those in scalars.items() if adapter in those}
        with torch.no_grad():
            for name in params:  # one value in all groups, as the oracle has it
                scalars[name][adapter].fill_(params[name])
        expected = naive.layer(
            *(np.float64(t.detach()) for t in (x, torch.zeros_like(linear.weight), torch.zeros(12), a, b, up)),
            s=sparsity, name=kernel, sparsify=sparsify, groups=groups, scope="group", p=params,
        )  # fmt: skip
        whole, gx = whole + expected["y"], gx + expected["x"]
        if not params:
            np.testing.assert_allclose(a.grad, expected["a"], rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(b.grad, expected["b"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(model(x).detach(), whole, rtol=1e-4, atol=1e-5)


def test_a_model_equals_the_harness() -> None:
    """The same factors in the harness's layers: the same output and gradients, to the bit."""
    ours, theirs = made(timm_vit), made(timm_vit)
    model = moved(get_peft_model(theirs, config(adapted_groups={"qkv": [0, 2]}, rank_pattern={"fc2": 2})))
    snell_dist.adapt(ours, "snell", rank=4, sparsity=0.5, targets=["q", "v", "proj", "fc1"])
    for layer in [block.mlp for block in ours.blocks]:
        snell_dist.adapt(layer, "snell", rank=2, sparsity=0.5, targets=["fc2"])
    factors = dict(ours.named_parameters())
    with torch.no_grad():
        for name, p in model.base_model.model.named_parameters():
            if "snell_" in name:
                factors[name.replace("snell_", "").removesuffix(".default")].copy_(p)
    for each in (ours, model):
        for p in each.parameters():
            p.grad = None
    outputs = [each(IMAGES) for each in (ours.requires_grad_(True), model)]
    for y in outputs:
        y.square().sum().backward()
    assert torch.equal(*outputs)
    for name, p in model.base_model.model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, factors[name.replace("snell_", "").removesuffix(".default")].grad)
    merged, plain = model.merge_and_unload().state_dict(), snell_dist.merge(ours).state_dict()
    assert all(torch.equal(merged[name], plain[name]) for name in plain)
