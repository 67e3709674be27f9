"""The families: their anatomy, counts, weights, and CLIP's rewritten attention. Methods on them: test_matrix.py."""

from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from snell_dist import methods
from snell_dist.anatomy import Backbone, fingerprint
from snell_dist.backbones import BackboneSection, section
from snell_dist.config import ConfigError, Plugin, UserError, check

FAMILIES = Plugin("backbones").names()
SMALL = Plugin("backbones").find("vit").smallest
SMALL_CLIP = Plugin("backbones").find("clip").smallest


def on_meta(name: str, classes: int = 10, **options: Any) -> Backbone:
    with torch.device("meta"):
        return section(name, **options).make(classes)


class Calls(TorchFunctionMode):
    """Names of torch's functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["vit", "vit/eva02_tiny_patch14_224", "swin", "clip", "clip/ViT-B-16-SigLIP"])
def test_explicit_attention_is_the_fused_one_as_written(name: str) -> None:
    logits, calls = {}, {}
    small = {} if "/" in name else Plugin("backbones").find(name).smallest
    for attention in ("fused", "explicit"):
        torch.manual_seed(0)
        backbone = section(name, **small, attention=attention).make(5)
        with Calls() as calls[attention]:
            logits[attention] = backbone.model(torch.randn(2, *backbone.image_shape))
    assert_close(logits["explicit"], logits["fused"], rtol=1e-5, atol=1e-5)
    fused = calls["fused"].names.count("scaled_dot_product_attention")
    assert fused >= len(backbone.blocks) / 2  # CLIP lists the blocks of both towers
    assert "scaled_dot_product_attention" not in calls["explicit"].names
    assert calls["explicit"].names.count("softmax") == fused


@pytest.mark.parametrize("attention", ["fused", "explicit"])
def test_both_towers_of_clip_take_the_chosen_attention(attention: str) -> None:
    towers = section("clip", **SMALL_CLIP, attention=attention).towers()
    model: Any = towers.model
    with Calls() as calls:
        model(torch.randn(2, *towers.image_shape), torch.ones(2, SMALL_CLIP["context"], dtype=torch.long))
    fused = SMALL_CLIP["depth"] + SMALL_CLIP["text_depth"] if attention == "fused" else 0
    assert calls.names.count("scaled_dot_product_attention") == fused


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def vit(classes: int = 3, **options: Any) -> Backbone:
    return section("vit", **SMALL | options).build([str(i) for i in range(classes)])


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("vit/tiny", "vit_tiny_patch16_224"),
        ("vit/base", "vit_base_patch16_224"),
        ("vit/large", "vit_large_patch16_224"),
        ("vit/huge", "vit_huge_patch14_224"),
        ("vit/giant", "vit_giant_patch14_224"),
        ("vit/deit_base_distilled_patch16_224", "deit_base_distilled_patch16_224"),
        ("vit/vit_large_patch14_dinov2", "vit_large_patch14_dinov2"),
        ("vit/eva_giant_patch14_224", "eva_giant_patch14_224"),
        ("vit/eva02_base_patch14_224", "eva02_base_patch14_224"),
        ("swin/base", "swin_base_patch4_window7_224"),
        ("swin/large", "swin_large_patch4_window7_224"),
        ("convnext/base", "convnext_base"),
        ("convnext/large", "convnext_large"),
        ("convnext/xlarge", "convnext_xlarge"),
    ],
)
def test_a_model_is_timms(name: str, library: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(library, num_classes=10)
    ours = on_meta(name)
    assert count(ours.model) == count(theirs)
    assert ours.model.state_dict().keys() == theirs.state_dict().keys()
    covered = {target.layer for target in ours.targets}
    inside = tuple(f"{block}." for block in ours.blocks.values())
    linear = {n for n, m in theirs.named_modules() if type(m) is nn.Linear and n.startswith(inside)}
    assert covered == linear, "every linear layer of every block is a target"


@pytest.mark.parametrize(
    ("name", "blocks", "first"),
    [
        ("vit/base", 12, {"qkv": ("q", "k", "v"), "proj": ("proj",), "fc1": ("fc1",), "fc2": ("fc2",)}),
        ("vit/huge", 32, {"qkv": ("q", "k", "v"), "proj": ("proj",), "fc1": ("fc1",), "fc2": ("fc2",)}),
        ("swin/base", 24, {"qkv": ("q", "k", "v"), "proj": ("proj",), "fc1": ("fc1",), "fc2": ("fc2",)}),
        ("convnext/base", 36, {"fc1": ("fc1",), "fc2": ("fc2",)}),
        ("clip/ViT-L-14", 24, {"qkv": ("q", "k", "v"), "out_proj": ("proj",), "c_fc": ("fc1",), "c_proj": ("fc2",)}),
        ("clip/ViT-B-16-SigLIP", 12, {"qkv": ("q", "k", "v"), "proj": ("proj",), "fc1": ("fc1",), "fc2": ("fc2",)}),
    ],
)
def test_blocks_and_targets_are_the_familys(name: str, blocks: int, first: dict[str, tuple[str, ...]]) -> None:
    backbone = on_meta(name)
    assert len(backbone.blocks) == blocks
    start = f"{next(iter(backbone.blocks.values()))}."
    own = {t.layer.rpartition(".")[2]: t.parts for t in backbone.targets if t.layer.startswith(start)}
    assert own == first


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_snells_parameters_are_the_papers_counts(rank: int) -> None:
    """ViT-B/16: 165,888 a unit of rank (1,327,104 for SNELL-8), the class token, and the head (spec, section 2)."""
    backbone = on_meta("vit/base", classes=100)
    method = check({"name": "snell", "rank": rank}, Plugin("methods").find("snell"))
    with torch.device("meta"):
        method.inject(backbone)
    parameters = dict(backbone.model.named_parameters())
    trains = method.trainable(backbone)
    factors = sum(parameters[name].numel() for name in trains if name.endswith((".a", ".b")))
    assert factors == rank * 165_888
    assert sum(parameters[name].numel() for name in trains) == factors + 768 + 769 * 100


@pytest.mark.parametrize("family", ["swin", "convnext"])
def test_what_the_paper_trains_besides(family: str) -> None:
    """Only the head, which in ConvNeXt holds the final norm; the reductions between stages are no targets."""
    backbone = on_meta(f"{family}/base")
    names = [name for name, _ in backbone.model.named_parameters()]
    method = check({"name": "snell"}, Plugin("methods").find("snell"))
    with torch.device("meta"):
        method.inject(backbone)
    besides = [name for name in method.trainable(backbone) if name in names]
    norm = ["head.norm.weight", "head.norm.bias"] if family == "convnext" else []
    assert sorted(besides) == sorted([*norm, "head.fc.weight", "head.fc.bias"])
    assert not [t for t in backbone.targets if "downsample" in t.layer]


def test_pointwise_convolutions_become_linear_and_give_the_same_logits(tmp_path: Path) -> None:
    """timm's small ConvNeXts have them; their published weights are convolutions."""
    options = {"depths": [1, 1, 2, 1], "widths": [8, 12, 16, 24]}
    theirs = timm.create_model("convnext_atto", num_classes=3, depths=options["depths"], dims=options["widths"]).eval()
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    ours = section("convnext/convnext_atto", weights=str(tmp_path / "w.safetensors"), head="file", **options)
    images = torch.randn(2, 3, 64, 64)
    assert_close(ours.build(["a", "b", "c"]).model.eval()(images), theirs(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", ["eva02_tiny_patch14_224", "vit_tiny_patch16_dinov3_qkvb"])
def test_evas_attention_calls_its_qkv_layer(size: str) -> None:
    """timm's own takes the layer's weight past its forward, where a delta would be without effect, silently."""
    shape = {"image_size": 64, "width": 48, "depth": 1, "heads": 4, "patch_size": 16}
    backbone = section(f"vit/{size}", **shape).make(3)
    theirs = timm.create_model(size, img_size=64, embed_dim=48, depth=1, num_heads=4, patch_size=16, num_classes=3)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    backbone.model.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert_close(backbone.model.eval()(images), theirs.eval()(images), rtol=1e-5, atol=1e-5)
    method = check({"name": "snell", "targets": ["q"], "rank": 4}, Plugin("methods").find("snell"))
    method.inject(backbone)
    backbone.model(images).sum().backward()
    assert methods.adapted_layers(backbone.model)[0][1].a.grad.any()


def test_the_models_name_says_what_is_not_as_usual() -> None:
    options = {**SMALL, "patch_size": None}
    assert vit(**options).name == "vit_tiny_patch16_224(img_size=32, embed_dim=24, depth=2, num_heads=2)"


def test_a_22b_like_vision_transformer_has_its_published_shape() -> None:
    """Dehghani et al. (2023): width 6144, depth 48, MLP 24576, 48 heads."""
    backbone = on_meta("vit/22b")
    block = backbone.model.blocks[-1]
    assert (len(backbone.blocks), block.attn.num_heads) == (48, 48)
    assert list(block.mlp.fc1.weight.shape) == [24576, 6144]
    assert 21.7e9 < count(backbone.model) < 22.0e9


def test_weights_come_back_and_the_classifier_is_new(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = vit()
    save_file(first.model.state_dict(), tmp_path / "w.safetensors")
    second = vit(5, weights=str(tmp_path / "w.safetensors"))
    assert fingerprint(second.model) == fingerprint(first.model)
    assert second.model.head.out_features == 5
    assert torch.equal(second.model.blocks[1].mlp.fc1.weight, first.model.blocks[1].mlp.fc1.weight)
    with torch.no_grad():
        second.model.blocks[0].norm1.bias[3] += 1e-7
    assert fingerprint(second.model) != fingerprint(first.model)


def test_the_files_own_classifier_is_kept_where_it_fits(tmp_path: Path) -> None:
    first = vit()
    save_file(first.model.state_dict(), tmp_path / "w.safetensors")
    images = torch.randn(2, 3, 32, 32)
    kept = vit(weights=str(tmp_path / "w.safetensors"), head="file")
    assert_close(kept.model.eval()(images), first.model.eval()(images), rtol=0, atol=0)
    with pytest.raises(UserError, match="has a classifier of 3 classes, and 5 are asked for"):
        vit(5, weights=str(tmp_path / "w.safetensors"), head="file")
    with pytest.raises(ConfigError, match=r"needs backbone\.weights"):
        vit(head="file")


def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    file = str(tmp_path / "w.safetensors")
    save_file(vit().model.state_dict(), file)
    with pytest.raises(UserError, match=r"has \[1, 1, 24\] for cls_token \[1, 1, 32\]"):
        vit(weights=file, width=32)
    with pytest.raises(UserError, match=r"fills 73\.\d% of the backbone, less than 99%; lacks blocks\.2\."):
        vit(weights=file, depth=3)
    assert len(vit(weights=file, depth=3, min_match=0.6).blocks) == 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vti", {}, "did you mean 'vit'"),
        ("vit/bsae", {}, "did you mean 'base'"),
        ("clip/ViT-B-33", {}, "did you mean 'ViT-B-3"),
        ("clip/RN50", {}, "no such model with a Vision Transformer"),
        ("swin/base", {"image_size": 100}, "must be a multiple of 32"),
        ("convnext/base", {"image_size": 16}, "must be at least 32"),
        ("clip/ViT-B-32", {"image_size": 50}, "must be a multiple of patch_size 32"),
        ("clip/ViT-B-32", {"width": 100, "heads": 3}, "must divide width 100"),
        ("swin/base", {"depths": [1, 1], "heads": [3]}, "timm cannot make swin_base"),
        ("vit/base", {"widht": 8}, "did you mean 'width'"),
        ("clip/ViT-B-32", {"templates": ["a photo"]}, "must have one {}"),
        ("clip/ViT-B-32", {"templates": ["a {} {0}"]}, "must have one {}"),
        ("clip/ViT-B-32", {"templates": ["a {}}"]}, "must have one {}"),
    ],
)
def test_a_model_that_cannot_be_made_is_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        section(name, **options).make(3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tag_that_does_not_exist_is_one_line(family: str) -> None:
    with pytest.raises(UserError, match=r"backbone\.weights = 'nonsense': \w+ cannot load them") as caught:
        section(family, weights="nonsense").build(["a", "b"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_makes_its_smallest_model_and_knows_its_sizes(family: str) -> None:
    chosen = Plugin("backbones").find(family)
    assert issubclass(chosen, BackboneSection)
    backbone = section(family, **chosen.smallest).make(3)
    assert backbone.model(torch.randn(2, *backbone.image_shape)).shape == (2, 3)
    assert len(chosen.sizes()) > 3
    assert all(isinstance(module, nn.Module) for module in backbone.block_modules)


def open_clips(**changes: Any) -> nn.Module:
    """open_clip's own model of the settings in SMALL_CLIP."""
    settings = open_clip.get_model_config("ViT-B-32")
    settings["embed_dim"] = 16
    settings["vision_cfg"] |= {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 12}
    settings["text_cfg"] |= {"context_length": 12, "width": 16, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    model = open_clip.CLIP(**settings, **changes).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 and len(parameter) > 1:
            nn.init.normal_(parameter, std=0.1)  # a bias of zeros would hide a mistake
    return model


@pytest.mark.parametrize("changes", [{}, {"quick_gelu": True}, {"init_logit_bias": -10}])
def test_clip_with_plain_linears_gives_open_clips_outputs(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = open_clips(**changes)
    save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    given = section("clip", **SMALL_CLIP, weights=str(tmp_path / "open_clip_model.safetensors"))
    size = "ViT-B-32-quickgelu" if "quick_gelu" in changes else "ViT-B-32"
    if "init_logit_bias" in changes:
        with torch.no_grad():
            del theirs.logit_bias
            theirs.logit_bias = None
    towers = given.model_copy(update={"size": size}).towers()
    model = towers.model.eval()
    images, tokens = torch.randn(3, 3, 32, 32), towers.tokenized(["a photo of a cat.", "a dog", "seven words"])
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    with torch.no_grad():
        for mine, own in zip(model(images, tokens), theirs(images, tokens), strict=True):
            assert_close(mine, own, rtol=1e-5, atol=1e-6)
    gradients = [
        torch.autograd.grad(sum(t.sum() for t in m.encode_image(images)), m.visual.class_embedding)[0]
        for m in (model, theirs)
    ]
    assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_clips_names_go_both_ways() -> None:
    given = section("clip", **SMALL_CLIP)
    ours, theirs = given.towers().model.state_dict(), open_clips().state_dict()
    assert {given.own_name(name): list(t.shape) for name, t in theirs.items()} == {
        n: list(t.shape) for n, t in ours.items()
    }
    assert {given.library_name(name) for name in ours} == theirs.keys()


@pytest.mark.parametrize("size", ["ViT-B-32", "ViT-L-14-336", "ViT-H-14", "ViT-bigG-14", "ViT-B-16-SigLIP"])
def test_clips_sizes_have_open_clips_parameters(size: str) -> None:
    settings = open_clip.get_model_config(size)
    with torch.device("meta"):
        custom = settings.pop("custom_text", False)
        theirs = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**settings)
        ours = section(f"clip/{size}").towers()
    assert count(ours.model) == count(theirs)


def test_a_zero_shot_classifier_starts_where_the_texts_are() -> None:
    """Its logits are scale <image, mean caption of the class>, both of length 1."""
    torch.manual_seed(0)
    templates = ["a photo of a {}.", "the digit {}"]
    given = section("clip", **SMALL_CLIP, head="zeroshot", templates=templates)
    torch.manual_seed(1)
    towers: Any = given.towers().model.eval()
    torch.manual_seed(1)
    model = given.build(["six", "seven"]).model.eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = towers.encode_image(images, normalize=True)
        means = []
        for name in ("six", "seven"):
            tokens = given.towers().tokenized([template.format(name) for template in templates])
            means.append(nn.functional.normalize(towers.encode_text(tokens, normalize=True).mean(0), dim=-1))
        expected = towers.logit_scale.exp() * features @ torch.stack(means).t()
        assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_a_model_without_texts_cannot_be_tuned_by_pairs() -> None:
    with pytest.raises(ConfigError, match="has no text tower"):
        section("vit", **SMALL).towers()


def test_targets_of_towers_are_named_by_tower() -> None:
    from snell_dist.anatomy import select_parts

    backbone = section("clip", **SMALL_CLIP).towers()
    chosen = select_parts(backbone.targets, ["visual.blocks.-1.q", "text.blocks.0:1.fc1"], backbone.blocks)
    assert {(t.layer, parts) for t, parts in chosen.items()} == {
        ("visual.transformer.resblocks.1.attn.qkv", (0,)),
        ("transformer.resblocks.0.mlp.c_fc", (0,)),
    }
    both = select_parts(backbone.targets, ["blocks.-1.proj"], backbone.blocks)
    assert len(both) == 2, "without a tower's name, both"


def test_only_the_chosen_methods_layers_are_replaced() -> None:
    backbone = vit()
    before = {name: type(module) for name, module in backbone.model.named_modules()}
    method = check({"name": "lora", "rank": 2, "targets": ["blocks.-1:.v"]}, Plugin("methods").find("lora"))
    method.inject(backbone)
    changed = [name for name, module in backbone.model.named_modules() if before.get(name) is not type(module)]
    assert changed == ["blocks.1.attn.qkv"]
    assert methods.adapted_layers(backbone.model)[0][1].adapted == (2,)
