"""What meets the model: sizes, classifiers, other models' files, and the line that says so."""

from __future__ import annotations

from dataclasses import replace

import published as pub
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn
from torch.testing import assert_close

from snell_dist.config import UserError
from snell_dist.weights import Published, fit


def given(model: nn.Module, **other: torch.Tensor) -> Published:
    return Published("some.file", "timm", {**model.state_dict(), **other})


def refusal(model: nn.Module, published: Published, **options: object) -> str:
    """The one line; the model must be as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        fit(model, published, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("size", [(48, 48), (16, 16), (32, 64)])
def test_position_embeddings_are_resized_to_other_images(size: tuple[int, int]) -> None:
    first, second = pub.randomised(pub.vit()), pub.vit(size=size)
    report = fit(second, given(first))
    grid = second.patch_embed.grid_size
    expected = resample_abs_pos_embed(first.pos_embed, grid, num_prefix_tokens=1, antialias=False)
    assert_close(second.pos_embed, expected, rtol=0, atol=0)
    assert report.resized == [f"pos_embed 4x4 to {grid[0]}x{grid[1]}"]


def test_position_embeddings_of_a_model_without_a_class_token_are_resized() -> None:
    options = {"class_token": False, "global_pool": "avg"}
    first, second = pub.randomised(pub.vit(**options)), pub.vit(size=48, **options)
    fit(second, given(first))
    expected = resample_abs_pos_embed(first.pos_embed, (6, 6), num_prefix_tokens=0, antialias=False)
    assert_close(second.pos_embed, expected, rtol=0, atol=0)


def test_a_distilled_files_second_token_is_left_out() -> None:
    distilled = pub.randomised(pub.vit(name="deit_tiny_distilled_patch16_224"))
    plain = pub.vit(size=48)
    report = fit(plain, given(distilled))
    kept = torch.cat([distilled.pos_embed[:, :1], distilled.pos_embed[:, 2:]], 1)
    assert_close(plain.pos_embed, resample_abs_pos_embed(kept, (6, 6), antialias=False), rtol=0, atol=0)
    assert {"dist_token", "head_dist.weight"} <= set(report.ignored)
    same_size = pub.vit()
    assert fit(same_size, given(distilled)).resized == []
    assert torch.equal(same_size.pos_embed, kept)
    again = pub.vit(name="deit_tiny_distilled_patch16_224")
    fit(again, given(distilled))
    assert torch.equal(again.pos_embed, distilled.pos_embed)


def test_positions_that_a_file_does_not_have_are_not_invented() -> None:
    said = refusal(pub.vit(name="deit_tiny_distilled_patch16_224"), given(pub.vit()), least=0)
    assert "has [1, 17, 48] for pos_embed [1, 18, 48]" in said
    square, oblong = pub.vit(size=48), pub.vit(size=(32, 64))
    assert "has [1, 33, 48] for pos_embed [1, 37, 48]" in refusal(square, given(oblong))
    registers = pub.vit(0, name="vit_small_patch14_reg4_dinov2")
    assert "for pos_embed" in refusal(registers, given(pub.vit()), least=0)


def test_the_models_dtype_stays() -> None:
    first, second = pub.randomised(pub.vit()), pub.vit().bfloat16()
    fit(second, given(first))
    assert second.norm.weight.dtype == torch.bfloat16
    assert torch.equal(second.norm.weight, first.norm.weight.bfloat16())


def test_a_model_on_the_meta_device_and_one_that_a_module_wraps_can_be_filled() -> None:
    with torch.device("meta"):
        assert fit(pub.vit(), given(pub.vit())).fraction == 1
    wrapped = nn.ModuleDict({"visual": pub.vit(size=48)})
    state = {f"visual.{name}": tensor for name, tensor in pub.vit().state_dict().items()}
    assert fit(wrapped, Published("f", "timm", state)).resized == ["visual.pos_embed 4x4 to 6x6"]


def test_another_depth_or_width_is_refused_before_anything_is_copied() -> None:
    deeper = refusal(pub.vit(depth=3), given(pub.vit()))
    assert "fills 70.2%" in deeper and "less than 99%" in deeper
    assert "lacks blocks.2.norm1.weight and 11 more" in deeper and "backbone.min_match lowers the limit" in deeper
    wider = refusal(pub.vit(embed_dim=72), given(pub.vit()))
    assert wider.startswith("backbone.weights = 'some.file' (timm): has [1, 1, 48] for cls_token [1, 1, 72]")
    assert refusal(pub.swin(), given(pub.vit()))
    assert refusal(pub.vit(), given(pub.swin()), key="key.of.mine").startswith("key.of.mine = ")


def test_the_limit_can_be_lowered_and_what_is_missing_is_said() -> None:
    report = fit(pub.vit(depth=3), given(pub.vit()), least=0.5)
    assert report.fraction == pytest.approx(0.70, abs=0.01)
    assert len(report.missing) == 12 and "missing blocks (12)" in str(report)


def test_what_every_block_lacks_is_said_once() -> None:
    report = fit(pub.vit(init_values=0.1, depth=3), given(pub.vit(depth=3)))
    assert "missing blocks.*.ls1.gamma (3), blocks.*.ls2.gamma (3)" in str(report)


def test_a_quantized_file_is_refused() -> None:
    said = refusal(pub.vit(), given(pub.vit(), **{"norm.weight": torch.ones(48, dtype=torch.int8)}))
    assert "norm.weight is torch.int8" in said


def test_the_classifier_is_new_unless_it_is_asked_for() -> None:
    first = pub.randomised(pub.vit())
    new, kept = pub.vit(), pub.vit()
    report = fit(new, given(first))
    assert report.ignored == ["head.weight", "head.bias"] and torch.count_nonzero(new.head.bias) == 0
    assert fit(kept, given(first), keep_head=True).ignored == []
    assert torch.equal(kept.head.weight, first.head.weight)


def test_a_classifier_of_other_classes_or_none_is_refused_where_it_is_asked_for() -> None:
    first = given(pub.vit())
    said = refusal(pub.vit(classes=7), first, keep_head=True)
    assert "has a classifier of 5 classes, and 7 are asked for" in said
    headless = replace(first, state={n: t for n, t in first.state.items() if not n.startswith("head.")})
    assert "has no classifier (head.weight)" in refusal(pub.vit(), headless, keep_head=True)


def test_a_linear_layer_fills_a_convolution_of_one_pixel_and_back() -> None:
    linear, convolution = pub.randomised(pub.convnext()), pub.convnext(conv_mlp=True)
    fit(convolution, given(linear))
    back = pub.convnext()
    fit(back, given(convolution))
    assert convolution.stages[0].blocks[0].mlp.fc1.weight.ndim == 4
    assert torch.equal(back.stages[0].blocks[0].mlp.fc1.weight, linear.stages[0].blocks[0].mlp.fc1.weight)


def test_swins_tables_of_another_window_are_counted_in_one_line() -> None:
    report = fit(pub.swin(size=64, window=8), given(pub.randomised(pub.swin())))
    assert len(report.resized) == 4
    assert report.resized[0] == "layers.0.blocks.0.attn.relative_position_bias_table 7x7 to 15x15"
    assert "resized relative_position_bias_table 7x7 to 15x15 (4)" in str(report)


def test_the_report_is_one_readable_line() -> None:
    said = str(fit(pub.vit(size=48), given(pub.vit())))
    assert said == (
        "weights: some.file (timm): 30 tensors, 100.0% of the backbone; resized pos_embed 4x4 to 6x6;"
        " ignored head.weight, head.bias"
    )


def test_every_timm_model_of_the_families_takes_its_own_state_back() -> None:
    for name, options in (
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1}),
        ("deit3_small_patch16_224", {"depth": 1}),
    ):
        first, second = (timm.create_model(name, num_classes=3, **options) for _ in range(2))
        report = fit(second, given(first), keep_head=True)
        assert report.missing == report.ignored == report.resized == []
        assert all(torch.equal(tensor, second.state_dict()[n]) for n, tensor in first.state_dict().items())
