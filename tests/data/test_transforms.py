"""Transforms: the released code's pixels, and timm's own transforms as a second oracle."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform

from snell_dist.data._transforms import NORMALISATIONS, SHORTER, augmented, centre, plain, squeeze

GOLDEN = Path(__file__).parent.parent / "golden"
STATISTICS = {"mean": NORMALISATIONS["imagenet"][0], "std": NORMALISATIONS["imagenet"][1]}


def picture() -> Image.Image:
    with Image.open(GOLDEN / "image.png") as image:
        return image.convert("RGB")


@pytest.mark.parametrize(("transform", "key"), [(squeeze, "vtab_224"), (centre, "fgvc_eval_224")])
def test_evaluation_has_the_golden_pixels(transform, key: str) -> None:
    ours = plain(transform(224, "imagenet"))(picture())[:, ::4, ::4]
    theirs = load_file(GOLDEN / "transforms_stride4.safetensors")[key]
    assert (ours - theirs).abs().max() <= 1e-6, "the same library computes"
    deviations = torch.tensor(NORMALISATIONS["imagenet"][1]).view(3, 1, 1)
    assert ((ours - theirs) * deviations).abs().max() <= 1 / 255


@pytest.mark.parametrize("size", [224, 384, 32])
def test_the_centre_crop_is_timms(size: int) -> None:
    theirs = create_transform((3, size, size), crop_pct=1 / SHORTER, interpolation="bilinear", **STATISTICS)
    torch.testing.assert_close(plain(centre(size, "imagenet"))(picture()), theirs(picture()))


def test_augmentation_is_timms_draw_for_draw() -> None:
    """timm draws its crops from Python's generator and torchvision from torch's, so one of them is not compared."""
    theirs = create_transform(
        (3, 64, 64), is_training=True, interpolation="bicubic", color_jitter=0.4, scale=(0.08, 1), **STATISTICS
    ).transforms
    ours = augmented(64, "imagenet").transforms
    crop = type(ours[0])
    assert (ours[0].size, ours[0].scale, ours[0].ratio) == (theirs[0].size, theirs[0].scale, theirs[0].ratio)
    assert issubclass(crop, torch.nn.Module)
    cut = ours[0](picture())
    for seed in range(5):
        results = []
        for chain in (ours, theirs):
            torch.manual_seed(seed)
            random.seed(seed)
            image = cut
            for step in chain[1:]:
                image = step(image)
            results.append(image)
        if not isinstance(results[1], torch.Tensor):
            results[1] = torch.as_tensor(results[1])
        torch.testing.assert_close(results[0], results[1])
