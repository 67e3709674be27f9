from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from snell_dist.backbones import fingerprint
from snell_dist.backbones.vit import PATCH, Vit
from snell_dist.config import UserError

SMALL = {"name": "vit", "size": "tiny", "image_size": 32, "width": 24, "depth": 2, "heads": 2}


@pytest.mark.parametrize("size", PATCH)
def test_every_size_builds_with_its_targets(size: str) -> None:
    """On the meta device, so that gigantic costs nothing; `fingerprint` reads bytes, so it is left out there."""
    import timm

    section = Vit(name="vit", size=size)
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size}_patch{PATCH[size]}_224", num_classes=3)
    backbone = Vit(name="vit", size=size, width=64, heads=4, depth=2).build(3)
    assert section.patch_size is None
    for name in backbone.targets:
        assert type(model.get_submodule(name)) is torch.nn.Linear
    assert backbone.model.patch_embed.patch_size[0] == PATCH[size]
    assert len(backbone.blocks) == 2


def test_the_models_name_says_what_is_not_as_usual() -> None:
    assert Vit(**SMALL).build(3).name == "vit_tiny_patch16_224(img_size=32, embed_dim=24, depth=2, num_heads=2)"


def test_weights_come_back_and_the_classifier_is_new(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = Vit(**SMALL).build(3)
    save_file(first.model.state_dict(), tmp_path / "w.safetensors")
    second = Vit(**SMALL, weights=str(tmp_path / "w.safetensors")).build(5)
    assert second.fingerprint == first.fingerprint
    assert second.model.head.out_features == 5
    assert torch.equal(second.model.blocks[1].mlp.fc1.weight, first.model.blocks[1].mlp.fc1.weight)
    with torch.no_grad():
        second.model.blocks[0].norm1.bias[3] += 1e-7
    assert fingerprint(second.model) != first.fingerprint


def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    save_file(Vit(**SMALL).build(3).model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"has \[1, 1, 24\] for cls_token \[1, 1, 32\]"):
        Vit(**SMALL | {"width": 32}, weights=str(tmp_path / "w.safetensors")).build(3)
    with pytest.raises(UserError, match=r"lacks blocks.2.norm1.weight .*is it another model's file"):
        Vit(**SMALL | {"depth": 3}, weights=str(tmp_path / "w.safetensors")).build(3)


def test_a_timm_tag_that_does_not_exist_is_one_line() -> None:
    with pytest.raises(UserError, match=r"backbone\.weights = 'nonsense': timm cannot load them") as caught:
        Vit(name="vit", weights="nonsense").build(3)
    assert "\n" not in str(caught.value)
