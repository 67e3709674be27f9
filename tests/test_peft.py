"""SNELL as a method of Hugging Face PEFT, on small random models of the real classes.

Oracles: the formulas in float64 (tests/ops/naive.py), the harness's own layers on the same weights, PEFT's LoRA on the
same calls, and the libraries' own loaders.
"""

import copy
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
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import snell_dist
from snell_dist.config import UserError
from snell_dist.formats._peft_names import from_peft, read, to_peft, write
from snell_dist.methods import remembered
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


def timm_vit(**said: Any) -> nn.Module:
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 4, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **small, **said)


Run = Callable[[nn.Module], Tensor]
MODELS: dict[Callable[[], nn.Module], tuple[Run, dict[str, Any]]] = {
    vit: (lambda m: m(IMAGES).logits, {"modules_to_save": ["classifier"], "parameters_to_save": ["*cls_token"]}),
    dinov2: (lambda m: m(IMAGES).logits, {"modules_to_save": ["classifier"], "parameters_to_save": ["*.norm1.bias"]}),
    swin: (lambda m: m(IMAGES).logits, {"modules_to_save": ["classifier"]}),
    clip: (lambda m: m(pixel_values=IMAGES, input_ids=TOKENS).logits_per_image, {}),
    llama: (lambda m: m(input_ids=TOKENS).logits, {"task_type": "CAUSAL_LM"}),
    gpt2: (lambda m: m(input_ids=TOKENS).logits, {"parameters_to_save": ["*.c_attn.bias"]}),
    timm_vit: (lambda m: m(IMAGES), {"modules_to_save": ["head"], "parameters_to_save": ["cls_token", "*.fc1.bias"]}),
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
    assert (
        len(saved) == len(trains) and sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]
    )
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
    linear, groups = nn.Linear(10, 12).requires_grad_(False), 3
    said = {"target_modules": ["0"], "kernel": kernel, "sparsify": sparsify, "groups": {"0": groups}}
    model = get_peft_model(nn.Sequential(linear), SnellConfig(rank=4, sparsity=0.7, **said))
    model.add_adapter("other", SnellConfig(rank=2, sparsity=0.25, **said))
    model.base_model.set_adapter(["default", "other"])
    layer = moved(model, 0.5).base_model.model[0]
    scalars = {name: getattr(layer, f"snell_{name}") for name in ("alpha", "beta", "gamma")}
    with torch.no_grad():
        for those in scalars.values():  # one value in all groups, as the oracle has it
            for values in those.values():
                values.fill_(values[0].item())
    x, up = torch.randn(5, 10, requires_grad=True), torch.randn(5, 12)
    y = model(x)
    y.backward(up)
    whole = np.float64(x.detach()) @ np.float64(linear.weight.T) + np.float64(linear.bias)
    gx = np.float64(up) @ np.float64(linear.weight)
    for adapter, sparsity in (("default", 0.7), ("other", 0.25)):
        a, b = layer.snell_a[adapter], layer.snell_b[adapter]
        params = {name: those[adapter][0].item() for name, those in scalars.items() if adapter in those}
        expected = naive.layer(
            *(np.float64(t.detach()) for t in (x, torch.zeros_like(linear.weight), torch.zeros(12), a, b, up)),
            s=sparsity, name=kernel, sparsify=sparsify, groups=groups, scope="group", p=params,
        )  # fmt: skip
        whole, gx = whole + expected["y"], gx + expected["x"]
        np.testing.assert_allclose(a.grad, expected["a"], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(b.grad, expected["b"], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(y.detach(), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x.grad, gx, rtol=1e-4, atol=1e-5)


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


def behaviour(make: Callable[..., Any], folder: Path) -> list[Any]:
    """What a PEFT user sees of a method, call by call."""
    seen: list[Any] = []
    model = get_peft_model(made(timm_vit), make(modules_to_save=["head"]))

    def look() -> None:
        status = model.get_model_status()
        fields = "num_adapter_layers enabled active_adapters merged_adapters requires_grad available_adapters devices"
        seen.append([getattr(status, field) for field in fields.split()])
        trains = [name.replace("lora_", "snell_") for name, p in model.named_parameters() if p.requires_grad]
        seen.append(sorted({name.split(".snell_")[0] for name in trains}))

    def refused(call: Callable[[], Any]) -> None:
        with pytest.raises(Exception) as caught:  # which one is what is compared
            call()
        seen.append([type(caught.value), str(caught.value)])

    look()
    model.add_adapter("other", make(target_modules=["qkv"]))
    look()
    model.set_adapter("other")
    look()
    with model.disable_adapter():
        look()
    look()
    refused(lambda: model.add_adapter("other", make()))
    refused(lambda: model.set_adapter("missing"))
    refused(lambda: model.delete_adapter("missing"))
    refused(lambda: get_peft_model(made(timm_vit), make(target_modules=["no_such_layer"])))
    model.save_pretrained(folder)
    seen.append(sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")))
    said = json.loads((folder / "adapter_config.json").read_text())
    seen.append([said[key] for key in ("auto_mapping", "inference_mode", "modules_to_save", "base_model_name_or_path")])
    for file in ("adapter_model.safetensors", "other/adapter_model.safetensors"):
        names = [name.replace("lora_", "snell_").removesuffix(".weight") for name in load_file(folder / file)]
        seen.append(sorted(name.lower() for name in names))
    model.load_adapter(folder, "third", is_trainable=True)
    look()
    model.base_model.set_adapter(["third"])
    look()
    model.merge_adapter()
    look()
    refused(lambda: model.delete_adapter("third"))
    model.unmerge_adapter()
    model.delete_adapter("third")
    look()
    model.set_adapter("default", inference_mode=True)
    look()
    seen.append(list(model.unload().state_dict()))
    return seen


def test_it_behaves_as_lora_does(tmp_path: Path) -> None:
    def lora(**said: Any) -> LoraConfig:
        return LoraConfig(
            r=4, **{"target_modules": ["qkv", "proj", "fc1"], "exclude_modules": ["patch_embed.proj"], **said}
        )

    def snell(**said: Any) -> SnellConfig:
        return config(**{"target_modules": ["qkv", "proj", "fc1"], "exclude_modules": ["patch_embed.proj"], **said})

    with warnings.catch_warnings(record=True) as those:
        theirs = behaviour(lora, tmp_path / "lora")
    with warnings.catch_warnings(record=True) as ours:
        mine = behaviour(snell, tmp_path / "snell")
    assert mine == theirs
    assert [str(w.message) for w in ours] == [str(w.message) for w in those]


def test_transformers_adds_and_loads_it_alone(tmp_path: Path) -> None:
    model = made(vit)
    before = model(IMAGES).logits
    model.add_adapter(config(parameters_to_save=["*cls_token"]))
    after = moved(model)(IMAGES).logits
    model.disable_adapters()
    assert torch.equal(model(IMAGES).logits, before)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        other = made(vit)
        other.load_adapter(str(tmp_path), low_cpu_mem_usage=low)
        assert torch.equal(other(IMAGES).logits, after)
    assert torch.equal(PeftModel.from_pretrained(made(vit), tmp_path)(IMAGES).logits, after)
    injected = inject_adapter_in_model(config(), made(timm_vit))
    assert relative(moved(injected)(IMAGES), made(timm_vit)(IMAGES)) > 1e-3


def test_factors_stay_float32_beside_a_bfloat16_base(tmp_path: Path) -> None:
    model = moved(get_peft_model(made(timm_vit).bfloat16(), config(parameters_to_save=["cls_token"])))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    images = IMAGES.bfloat16()
    after = model(images)
    after.sum().backward()
    assert after.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(made(timm_vit).bfloat16(), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(again(images), after)
        again.load_adapter(tmp_path, "second", low_cpu_mem_usage=low)
        assert torch.equal(again(images), after)
        again.set_adapter("second")
        assert torch.equal(again(images), after)
    wide = PeftModel.from_pretrained(made(timm_vit), tmp_path)  # the same base in float32 is the same base
    assert relative(wide(IMAGES), after.float()) < 0.05
    model.merge_adapter()
    assert model.base_model.model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    model.unmerge_adapter()
    assert torch.equal(model(images), after)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model = moved(get_peft_model(made(vit), config(dropout=0.5))).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(2)
        model(pixel_values=IMAGES).logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(g.any() for g in grads[0].values())
    assert all(torch.equal(g, grads[1][name]) for name, g in grads[0].items())


def test_it_compiles_whole() -> None:
    model = moved(get_peft_model(made(timm_vit), config(parameters_to_save=["cls_token"])))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative(compiled(IMAGES), model(IMAGES)) < 1e-6
    compiled(IMAGES).sum().backward()


@pytest.mark.parametrize(("said", "complaint"), [
    ({"rank": 3}, "`rank` = 3: must be even"),
    ({"rank": 0}, "`rank` = 0: must be greater than or equal to 1"),
    ({"rank": 30}, "`rank` = 30: is larger than a layer of 24 x 24 .allowed: at most 24.*blocks.0.attn.qkv"),
    ({"rank_pattern": {"fc1": 5}}, "`rank` = 5: must be even"),
    ({"sparsity": 1.0}, "`sparsity` = 1.0: must be less than 1"),
    ({"sparsity": float("nan")}, "`sparsity` = nan: must be a finite number"),
    ({"sparsity_pattern": {"qkv": [0.5, 0.5]}}, "`sparsity_pattern` must be one number or 3 for blocks.0.attn.qkv"),
    ({"kernel": "gauss"}, "`kernel` = 'gauss': unknown value .allowed: distance, linear, sigmoid"),
    ({"sparsify": "soft"}, "`sparsify` = 'soft': unknown value"),
    ({"dropout": 1.0}, "`dropout` = 1.0: must be less than 1"),
    ({"groups": {"qkv": 5}}, "`groups`: the 72 rows of blocks.0.attn.qkv are not 5 equal groups"),
    ({"groups": {"qkv": 0}}, "`groups` must be positive integers; got 0"),
    ({"adapted_groups": {"qkv": [0, 3]}}, "`adapted_groups` must be rising numbers below 3"),
    ({"target_modules": ["attn"]}, "Target module blocks.0.attn is a Attention. Currently, only"),
    ({"target_modules": ["norm1"]}, "Target module blocks.0.norm1 is a LayerNorm"),
    ({"target_modules": ["qvk"], "exclude_modules": None}, "Target modules {'qvk'} not found in the base model"),
    ({"target_modules": None}, "Please specify `target_modules`"),
    ({"parameters_to_save": ["cls_tokn"]}, "`parameters_to_save` = 'cls_tokn': matches no parameter, did you mean"),
    ({"layers_pattern": "blocks"}, "`layers_to_transform` must also be specified"),
    ({"seed": "one"}, "`seed` must be an integer or None; got 'one'"),
])  # fmt: skip
def test_what_does_not_fit_is_said_in_a_line(said: dict[str, Any], complaint: str) -> None:
    model = made(timm_vit)
    with pytest.raises(ValueError, match=complaint) as caught:
        get_peft_model(model, config(**said))
    assert len(str(caught.value).splitlines()) == 1
    assert not any(isinstance(module, SnellLinear | SnellParameter) for module in model.modules())


def test_attention_that_bypasses_its_layer_is_refused() -> None:
    model = nn.TransformerEncoderLayer(24, 2, 48)
    with pytest.raises(
        ValueError, match=r"self_attn.out_proj: nn.MultiheadAttention computes with this layer's weight"
    ):
        get_peft_model(model, config())
    assert get_peft_model(model, config(exclude_modules=["out_proj"])).get_model_status().num_adapter_layers == 2


def test_an_adapter_knows_its_base(tmp_path: Path) -> None:
    said = config()
    model = moved(get_peft_model(made(timm_vit), said))
    after = model(IMAGES)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    other = timm_vit()
    with pytest.raises(ValueError, match="'default' belongs to another base model: weights of the adapted layers") as e:
        PeftModel.from_pretrained(other, tmp_path)
    assert len(str(e.value).splitlines()) == 1
    assert not any(isinstance(module, SnellLinear) for module in other.modules())
    with pytest.raises(ValueError, match="names or shapes of the adapted layers differ"):
        PeftModel.from_pretrained(timm_vit(mlp_ratio=2), tmp_path)
    with pytest.raises(ValueError, match="another base model"):  # the delta would be there twice
        PeftModel.from_pretrained(model.merge_and_unload(), tmp_path)
    with pytest.raises(ValueError, match="was merged or unloaded already"):
        model.merge_and_unload()
    allowed = SnellConfig.from_pretrained(tmp_path)
    allowed.base_fingerprint = None
    PeftModel.from_pretrained(other, tmp_path, config=allowed)
    get_peft_model(timm_vit(), said)  # a config that is used again makes a new adapter
    renamed = made(timm_vit)
    renamed.name_or_path = "elsewhere"
    assert torch.equal(PeftModel.from_pretrained(renamed, tmp_path)(IMAGES), after)


def test_merging_twice_is_refused() -> None:
    model = moved(get_peft_model(made(timm_vit), config()))
    after = model(IMAGES)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Adapters \['default'\] are merged already"):
        model.merge_adapter()
    assert relative(model.merge_and_unload()(IMAGES), after) < 1e-6
    broken = get_peft_model(made(timm_vit), config())
    with torch.no_grad():
        broken.base_model.model.blocks[1].mlp.fc1.snell_a["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="a has 1 of 96 entries that are not finite"):
        broken.merge_adapter(safe_merge=True)


def test_active_adapters_add_up_and_unmerge_in_any_order() -> None:
    model = get_peft_model(made(timm_vit), config(parameters_to_save=["cls_token"]))
    model.add_adapter("other", config(rank=2, sparsity=0.9, target_modules=["fc1"], parameters_to_save=["cls_token"]))
    model.base_model.set_adapter(["default", "other"])
    both = moved(model)(IMAGES)
    weight = model.base_model.model.blocks[0].mlp.fc1.base_layer.weight.clone()
    with pytest.raises(ValueError, match="SNELL adapters cannot be mixed in one batch"):
        model(IMAGES, adapter_names=["default", "other"])
    model.merge_adapter(["other"])
    model.merge_adapter(["default"])
    assert relative(model(IMAGES), both) < 1e-6
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.blocks[0].mlp.fc1.base_layer.weight, weight)
    assert torch.equal(model(IMAGES), both)
    assert relative(model.merge_and_unload()(IMAGES), both) < 1e-6


def test_a_copy_is_a_model_of_its_own() -> None:
    model = moved(get_peft_model(made(timm_vit), config(parameters_to_save=["cls_token", "*.fc1.bias"])))
    after, copied = model(IMAGES), copy.deepcopy(model)
    moved(model)
    assert torch.equal(copied(IMAGES), after)
    copied.merge_adapter()
    copied.unmerge_adapter()
    assert torch.equal(copied(IMAGES), after)
    assert relative(copied.merge_and_unload()(IMAGES), after) < 1e-6


def test_a_seed_draws_the_same_factors() -> None:
    one, two = (get_peft_model(made(timm_vit), config(seed=7, target_modules=t)) for t in (["fc1"], ["qkv", "fc1"]))
    first, second = (model.base_model.model.blocks[0].mlp.fc1.snell_a["default"] for model in (one, two))
    assert torch.equal(first, second)
    assert not torch.equal(first, one.base_model.model.blocks[1].mlp.fc1.snell_a["default"])


def test_a_delta_becomes_a_lora() -> None:
    """PEFT's own conversion, with as many ranks as the matrix has: nothing is lost."""
    model = moved(get_peft_model(made(timm_vit), config(target_modules=["fc1"])))
    lora, state = convert_to_lora(model, rank=24, adapter_name="default")
    again = get_peft_model(made(timm_vit), lora)
    again.load_state_dict({name.replace(".weight", ".default.weight"): t for name, t in state.items()}, strict=False)
    assert relative(again(IMAGES), model(IMAGES)) < 1e-4


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_base_trains_and_refuses_to_merge(bits: int) -> None:
    import bitsandbytes as bnb

    model = made(timm_vit)
    for block in model.blocks:
        plain = block.mlp.fc1
        kinds = {8: bnb.nn.Linear8bitLt, 4: bnb.nn.Linear4bit}
        extra = {"has_fp16_weights": False} if bits == 8 else {"compute_dtype": torch.float32}
        block.mlp.fc1 = kinds[bits](plain.in_features, plain.out_features, **extra)
        block.mlp.fc1.load_state_dict(plain.state_dict())
        block.mlp.fc1.to("cpu")
    before = model(IMAGES)
    adapted = get_peft_model(model, config())
    with adapted.disable_adapter():
        assert torch.equal(adapted(IMAGES), before)
    moved(adapted)(IMAGES).sum().backward()
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"Cannot merge into a weight of torch\.u?int8"):
        adapted.merge_adapter()


def test_trainer_trains_it(tmp_path: Path) -> None:
    """A small ViT with random, frozen weights and half of the digits: it gets most of the others right."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1).expand(-1, 3, -1, -1)
    rows = [{"pixel_values": x, "labels": label} for x, label in zip(images, digits.target.tolist(), strict=True)]
    said = SMALL | {"hidden_size": 48, "image_size": 8, "patch_size": 2, "intermediate_size": 96, "num_labels": 10}

    def base() -> nn.Module:
        return made(lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**said)))

    model = get_peft_model(base(), SnellConfig(sparsity=0.5, modules_to_save=["classifier"]))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=120, per_device_train_batch_size=64, learning_rate=5e-2, report_to=[],
        save_steps=120, use_cpu=True, label_names=["labels"], disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows[::2])
    trainer.train()
    with torch.no_grad():
        logits = model.eval()(pixel_values=images[1::2]).logits
        again = PeftModel.from_pretrained(base(), tmp_path / "checkpoint-120")(pixel_values=images[1::2]).logits
    assert torch.equal(again, logits)
    assert (logits.argmax(1).numpy() == digits.target[1::2]).mean() > 0.6


METHODS: dict[str, dict[str, Any]] = {
    "snell": {"rank": 4, "sparsity": 0.5, "kernel": "sigmoid", "targets": ["q", "v", "fc1"]},
    "snella": {"rank": 4, "allocator": {"target_sparsity": 0.5}, "targets": ["*"]},
    "mixk": {"rank": 4, "targets": ["blocks.-1:"]},
    "lora": {"rank": 4, "alpha": 3.0, "targets": ["q", "v", "proj"]},
    "rslora": {"rank": 3, "scaling": "rslora"},
    "dora": {"rank": 4, "dora": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_our_adapters_become_pefts_and_back(method: str, tmp_path: Path) -> None:
    name = "lora" if method.endswith("ora") else method
    also = ["head", "norm"] + (["cls_token", "blocks.*.norm1.bias"] if name != "lora" else [])
    model = moved(snell_dist.adapt(made(timm_vit), name, also_train=also, **METHODS[method]))
    for each in model.modules():
        if "kept" in dict(each.named_buffers(recurse=False)):
            each.kept.copy_(torch.randint(5, 500, each.kept.shape))
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad} | remembered(model)
    expected, limit = model(IMAGES), 1e-6 if name == "lora" else 0
    write(tmp_path, *to_peft(model, tensors))

    theirs = PeftModel.from_pretrained(made(timm_vit), tmp_path)
    assert relative(theirs(IMAGES), expected) <= limit
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = PeftModel.from_pretrained(made(timm_vit), tmp_path, is_trainable=True).get_nb_trainable_parameters()[0]
    assert counted == trains or name == "lora"  # the zeros of its blocks count, too

    ours = made(timm_vit)
    values = from_peft(*read(tmp_path), ours)
    assert relative(ours(IMAGES), expected) <= limit
    if name != "lora":
        lost = {n for n in tensors if "mean_" in n or "spread_" in n}
        assert values.keys() == tensors.keys() - lost
        assert all(torch.equal(values[n], tensors[n]) for n in values)
        assert all(torch.equal(ours.state_dict()[n], tensors[n]) for n in values)


def test_what_has_no_place_in_peft_is_refused(tmp_path: Path) -> None:
    bitfit = snell_dist.adapt(made(timm_vit), "bias")
    with pytest.raises(UserError, match="what adds no factors; snell, snella, mixk and lora can be written"):
        to_peft(bitfit, {})
    lora = snell_dist.adapt(made(timm_vit), "lora", rank=2, also_train=["cls_token"])
    with pytest.raises(UserError, match="cls_token trains, for which LoRA in PEFT has no place"):
        to_peft(lora, {n: p for n, p in lora.named_parameters() if p.requires_grad})
    with pytest.raises(UserError, match="no adapter of PEFT, which has adapter_config"):
        read(tmp_path)
    get_peft_model(made(timm_vit), LoHaConfig(target_modules=["fc1"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="LOHA; SNELL and LORA can be read"):
        from_peft(*read(tmp_path), made(timm_vit))
