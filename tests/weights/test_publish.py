"""Back to the names of Transformers: what a layout publishes is what it reads, and what the library saves itself."""

from __future__ import annotations

from typing import Any

import published as pub
import pytest
import torch
from torch import Tensor, nn

from snell_dist import weights

REGISTERS = {"reg_tokens": 4, "no_embed_class": True}
MODELS: dict[str, tuple[str, Any]] = {
    "vit": ("hf_vit", lambda: pub.vit()),
    "distilled": ("hf_vit", lambda: pub.vit(name="deit_tiny_distilled_patch16_224")),
    "dinov2": ("hf_dinov2", lambda: pub.vit(init_values=1.0)),
    "registers": ("hf_dinov2", lambda: pub.vit(init_values=1.0, **REGISTERS)),
    "gated": ("hf_dinov2", lambda: pub.vit(name="vit_giant_patch14_dinov2", mlp_ratio=16 / 3)),
    "swin": ("hf_swin", lambda: pub.swin()),
    "convnext": ("hf_convnext", lambda: pub.convnext()),
    "convnextv2": ("hf_convnext", lambda: pub.convnext(name="convnextv2_tiny")),
    "clip": ("hf_clip", lambda: pub.clip()),
}


def published(layout: Any, model: nn.Module) -> dict[str, Tensor]:
    state, shapes = model.state_dict(), model.to_empty(device="meta").state_dict()
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        made = dict(layout.publish(name, tensor, shapes))
        planned = dict(layout.publish(name, shapes[name], shapes))
        assert not found.keys() & made.keys()
        assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in planned.items()}
        found |= made
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_a_layout_reads_what_it_publishes(kind: str) -> None:
    name, make = MODELS[kind]
    layout = weights.LAYOUTS[name]
    model = pub.randomised(make())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = published(layout, model)
    assert next(each for each in weights.LAYOUTS.values() if each.matches(found)) is layout
    again = layout.convert(found)
    assert set(again) - set(before) <= {"mask_token"}
    for each, tensor in before.items():
        assert torch.equal(again[each].reshape(tensor.shape), tensor), each  # lengths of one say nothing to `fit`


def test_rows_of_a_fused_matrix_are_views_of_it() -> None:
    weight = torch.randn(12, 4)
    parts = dict(weights.LAYOUTS["hf_vit"].publish("blocks.0.attn.qkv.weight", weight, {}))
    assert [t.data_ptr() for t in parts.values()] == [weight[i : i + 4].data_ptr() for i in (0, 4, 8)]


def test_a_classifier_of_class_token_and_patches_stays_as_it_is() -> None:
    """Only one whose part for the patches is zero is as timm's."""
    layout = weights.LAYOUTS["hf_dinov2"]
    model = pub.randomised(pub.vit(init_values=1.0))
    found = published(layout, model)
    found["classifier.weight"] = torch.randn(pub.CLASSES, 96)
    assert layout.convert(found)["head.weight"].shape == (pub.CLASSES, 96)
