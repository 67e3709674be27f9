"""Each published layout against what its own library computes from the same file."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import open_clip
import published as pub
import pytest
import timm
import torch
import transformers
from torch.testing import assert_close

from snell_dist import weights

HEADS = {"keep_head": True}


def features(model: torch.nn.Module, size: int = pub.SIZE) -> torch.Tensor:
    with torch.no_grad():
        return model.forward_features(pub.images(size))


def logits(model: torch.nn.Module, size: int = pub.SIZE) -> torch.Tensor:
    with torch.no_grad():
        return model(pub.images(size))


def saved(content: object, folder: Path, **options: object) -> Path:
    path = folder / "weights.pth"
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_jax_arrays_give_the_logits_that_timm_gets_from_them(prefix: str, tmp_path: Path) -> None:
    file = tmp_path / "ViT.npz"
    arrays = pub.jax_vit(pub.randomised(pub.vit()), prefix, big_vision=prefix == "params/")
    np.savez(file, **arrays)
    theirs, ours = pub.vit(), pub.vit()
    theirs.load_pretrained(str(file))
    found = weights.read(file)
    report = weights.fit(ours, found, **HEADS)
    assert found.layout == "JAX ViT"
    assert report.ignored == ["pre_logits.weight", "pre_logits.bias"]
    assert_close(logits(ours), logits(theirs), rtol=0, atol=0)


def test_jax_arrays_in_bfloat16_are_read(tmp_path: Path) -> None:
    model = pub.randomised(pub.vit()).bfloat16().float()
    arrays = pub.jax_vit(model)
    half = {name: torch.tensor(a).bfloat16().view(torch.int16).numpy().view("V2") for name, a in arrays.items()}
    np.savez(tmp_path / "ViT.npz", **half)
    ours = pub.vit()
    weights.fit(ours, weights.read(tmp_path / "ViT.npz"), **HEADS)
    assert_close(logits(ours), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("layout", pub.VIT_FILES)
def test_a_vision_transformer_computes_what_it_did_when_it_was_published(layout: str, tmp_path: Path) -> None:
    model, ours = pub.randomised(pub.vit()), pub.vit()
    found = weights.read(saved(pub.VIT_FILES[layout](model), tmp_path))
    report = weights.fit(ours, found)
    assert found.layout == layout
    assert report.fraction == 1 and report.missing == []
    assert_close(features(ours), features(model), rtol=0, atol=0)
    assert not torch.equal(ours.head.weight, model.head.weight)


def test_mocos_linear_probe_brings_its_classifier_where_it_is_wanted(tmp_path: Path) -> None:
    model, ours = pub.randomised(pub.vit()), pub.vit()
    weights.fit(ours, weights.read(saved(pub.moco_linear(model), tmp_path)), **HEADS)
    assert_close(logits(ours), logits(model), rtol=0, atol=0)


def test_a_masked_autoencoders_decoder_is_named_as_ignored(tmp_path: Path) -> None:
    report = weights.fit(pub.vit(), weights.read(saved(pub.mae(pub.vit()), tmp_path)))
    assert "decoder_blocks.0.attn.qkv.weight" in report.ignored
    assert "ignored mask_token, decoder_embed.weight, decoder_pos_embed" in str(report)


def test_dinov2_with_registers_gives_the_features_that_timm_gets(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        return pub.vit(0, name="vit_small_patch14_reg4_dinov2")

    file = saved(pub.dinov2_official(pub.randomised(model())), tmp_path)
    theirs, ours = model(), model()
    theirs.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(torch.load(file), theirs))
    found = weights.read(file)
    weights.fit(ours, found)
    assert found.layout == "DINOv2 (Facebook)"
    assert_close(features(ours), features(theirs), rtol=0, atol=0)


def test_deit_iii_gives_the_logits_that_timm_gets(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        return pub.vit(name="deit3_small_patch16_224")

    state = pub.randomised(model()).state_dict()
    renamed = {re.sub(r"ls([12])\.gamma", r"gamma_\1", name): tensor for name, tensor in state.items()}
    file = saved({"model": renamed}, tmp_path)
    theirs, ours = model(), model()
    filtered = timm.models.vision_transformer.checkpoint_filter_fn
    theirs.load_state_dict(filtered(torch.load(file), theirs, adapt_layer_scale=True))
    report = weights.fit(ours, weights.read(file), **HEADS)
    assert report.missing == report.ignored == [] and report.layout == "DeiT III (Facebook)"
    assert_close(logits(ours), logits(theirs), rtol=0, atol=0)


@pytest.mark.parametrize(("size", "window"), [(32, 4), (64, 8), (32, 2)])
def test_microsofts_swin_gives_the_logits_that_timm_gets(size: int, window: int, tmp_path: Path) -> None:
    file = saved(pub.swin_official(pub.randomised(pub.swin())), tmp_path)
    theirs, ours = pub.swin(size=size, window=window), pub.swin(size=size, window=window)
    theirs.load_state_dict(timm.models.swin_transformer.checkpoint_filter_fn(torch.load(file), theirs))
    found = weights.read(file)
    report = weights.fit(ours, found, **HEADS)
    assert found.layout == "Swin (Microsoft)"
    assert bool(report.resized) == (window != 4) and report.ignored == []
    assert_close(logits(ours, size), logits(theirs, size), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"conv_mlp": True}, {"name": "convnextv2_tiny"}], ids=["linear", "1x1", "V2"])
def test_facebooks_convnext_gives_the_logits_that_timm_gets(options: dict, tmp_path: Path) -> None:
    linear = {key: value for key, value in options.items() if key != "conv_mlp"}
    file = saved(pub.convnext_official(pub.randomised(pub.convnext(**linear))), tmp_path)
    theirs, ours = pub.convnext(**options), pub.convnext(**options)
    theirs.load_state_dict(timm.models.convnext.checkpoint_filter_fn(torch.load(file), theirs))
    found = weights.read(file)
    weights.fit(ours, found, **HEADS)
    assert found.layout == "ConvNeXt (Facebook)"
    assert_close(logits(ours), logits(theirs), rtol=0, atol=0)


def test_the_norm_in_convnexts_head_was_pretrained_and_is_copied(tmp_path: Path) -> None:
    model, ours = pub.randomised(pub.convnext()), pub.convnext(classes=3)
    weights.fit(ours, weights.read(saved(pub.convnext_official(model), tmp_path)))
    assert torch.equal(ours.head.norm.weight, model.head.norm.weight)
    assert ours.head.fc.out_features == 3


VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
VIT |= {"intermediate_size": 192, "layer_norm_eps": 1e-6, "num_labels": pub.CLASSES}
DINO = VIT | {"mlp_ratio": 4}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
CONVNEXT = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 12, 16, 24], "num_labels": pub.CLASSES}
HUGGING_FACE = {
    "Hugging Face ViT": (transformers.ViTForImageClassification, transformers.ViTConfig(**VIT), pub.vit),
    "Hugging Face Swin": (
        transformers.SwinForImageClassification,
        transformers.SwinConfig(**SWIN, num_labels=pub.CLASSES),
        pub.swin,
    ),
    "Hugging Face ConvNeXt": (
        transformers.ConvNextForImageClassification,
        transformers.ConvNextConfig(**CONVNEXT),
        pub.convnext,
    ),
}


@pytest.mark.parametrize("form", ["as published", "as in memory"])
@pytest.mark.parametrize("layout", HUGGING_FACE)
def test_a_hugging_face_classifier_gives_its_own_logits(layout: str, form: str, tmp_path: Path) -> None:
    kind, config, make = HUGGING_FACE[layout]
    theirs, ours = pub.randomised(kind(config)), make()
    if form == "as published":
        theirs.save_pretrained(tmp_path)
    else:
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    found = weights.read(tmp_path)
    report = weights.fit(ours, found, **HEADS)
    assert found.layout == layout
    assert report.ignored == [] and report.missing == []
    with torch.no_grad():
        expected = theirs(pub.images()).logits
    assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)


def test_a_bare_hugging_face_vision_transformer_is_read_without_its_prefix(tmp_path: Path) -> None:
    theirs = pub.randomised(transformers.ViTModel(transformers.ViTConfig(**VIT)))
    theirs.save_pretrained(tmp_path)
    ours = pub.vit()
    report = weights.fit(ours, weights.read(tmp_path))
    assert report.ignored == ["pooler.dense.bias", "pooler.dense.weight"]
    with torch.no_grad():
        expected = theirs(pub.images()).last_hidden_state
    assert_close(features(ours), expected, rtol=1e-5, atol=1e-5)


def test_hugging_faces_convnext_v2_gives_its_own_logits(tmp_path: Path) -> None:
    config = transformers.ConvNextV2Config(**CONVNEXT)
    theirs = pub.randomised(transformers.ConvNextV2ForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    ours = pub.convnext(name="convnextv2_tiny")
    report = weights.fit(ours, weights.read(tmp_path), **HEADS)
    assert report.missing == report.ignored == []
    with torch.no_grad():
        expected = theirs(pub.images()).logits
    assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("registers", [0, 4])
def test_hugging_faces_dinov2_gives_its_own_features(registers: int, tmp_path: Path) -> None:
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=registers)
        theirs = transformers.Dinov2WithRegistersModel(config)
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**DINO))
    pub.randomised(theirs).save_pretrained(tmp_path)
    ours = pub.vit(0, name="vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2")
    found = weights.read(tmp_path)
    weights.fit(ours, found)
    assert found.layout == "Hugging Face DINOv2"
    with torch.no_grad():
        expected = theirs(pub.images()).last_hidden_state
    assert_close(features(ours), expected, rtol=1e-5, atol=1e-5)


def clip(size: int = 32, context: int = 12) -> open_clip.CLIP:
    vision = {"image_size": size, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16}
    text = {"context_length": context, "vocab_size": 50, "width": 24, "heads": 3, "layers": 2}
    return open_clip.CLIP(16, vision, text).eval()


def test_hugging_faces_clip_gives_its_own_features_of_images_and_texts(tmp_path: Path) -> None:
    vision = {key: value for key, value in VIT.items() if key not in ("layer_norm_eps", "num_labels")}
    text = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    text |= {"vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    gelu = {"hidden_act": "gelu"}
    config = transformers.CLIPConfig(text_config=text | gelu, vision_config=vision | gelu, projection_dim=16)
    theirs = pub.randomised(transformers.CLIPModel(config))
    theirs.save_pretrained(tmp_path)
    ours = clip()
    found = weights.read(tmp_path)
    report = weights.fit(ours, found)
    assert found.layout == "Hugging Face CLIP" and report.fraction == 1 and report.ignored == []
    tokens = torch.randint(1, 49, (3, 12), generator=torch.Generator().manual_seed(1))
    tokens[:, -1] = 49
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=pub.images())
        image, text = ours.encode_image(pub.images(), normalize=True), ours.encode_text(tokens, normalize=True)
        assert_close(image, expected.image_embeds, rtol=1e-5, atol=1e-5)
        assert_close(text, expected.text_embeds, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


def test_open_clips_own_weights_are_resized_as_open_clip_resizes_them(tmp_path: Path) -> None:
    file = saved({"state_dict": {f"module.{n}": t for n, t in pub.randomised(clip()).state_dict().items()}}, tmp_path)
    theirs, ours = clip(48, 20), clip(48, 20)
    state = open_clip.factory.load_state_dict(str(file))
    open_clip.model.resize_pos_embed(state, theirs, antialias=False)
    open_clip.model.resize_text_pos_embed(state, theirs)
    theirs.load_state_dict(state)
    report = weights.fit(ours, weights.read(file))
    assert report.resized == ["positional_embedding 12 to 20", "visual.positional_embedding 4x4 to 6x6"]
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert_close(ours.encode_image(pub.images(48)), theirs.encode_image(pub.images(48)), rtol=0, atol=0)
        assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=0, atol=0)


def test_every_layout_but_the_last_recognises_only_its_own(tmp_path: Path) -> None:
    vit = pub.vit()
    samples = {
        "vit_jax": {name: torch.tensor(a) for name, a in pub.jax_vit(vit).items()},
        "mae": pub.mae(vit)["model"],
        "vit_separate": pub.separate(vit),
        "swin_official": pub.swin_official(pub.swin())["model"],
        "convnext_official": pub.convnext_official(pub.convnext())["model"],
        "native": vit.state_dict(),
    }
    for expected, state in samples.items():
        hits = [name for name, layout in weights.LAYOUTS.items() if layout.matches(state)]
        assert hits[0] == expected and set(hits) <= {expected, "native"}
