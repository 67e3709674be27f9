"""From a picture to what the model takes: resize, crop, normalise; for training, augmented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snell_dist.data import Preprocessing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Prepare:
    """A picture, in the colours that a model takes, to [C, H, W]; other processes may be sent it."""

    channels: int
    transform: Transform

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.transform(picture.convert("L" if self.channels == 1 else "RGB"))


NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # the released code's, for every checkpoint
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # what the supervised ViTs were pretrained with
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
AUGMENTATION = "crops of 8-100 % at ratios of 3/4-4/3, bicubic; mirrored; colours shaken by 0.4"
SHORTER = 256 / 224  # of the crop's side: what a picture's shorter side becomes


def squeeze(size: int, normalisation: str) -> Preprocessing:
    """The whole picture at size x size pixels, bicubic, whatever its shape: VTAB-1k."""
    return Preprocessing(size, 3, "squeeze", "bicubic", *NORMALISATIONS[normalisation])


def centre(size: int, normalisation: str) -> Preprocessing:
    """The shorter side at 256/224 of size, bilinear, then the centre: FGVC's evaluation."""
    return Preprocessing(size, 3, "centre", "bilinear", *NORMALISATIONS[normalisation])


def plain(said: Preprocessing) -> Transform:
    """From a picture of so many channels to [channels, size, size], without chance."""
    from torchvision import transforms as T

    size, how = said.size, T.InterpolationMode(said.interpolation)
    parts = {
        "squeeze": [T.Resize((size, size), interpolation=how)],
        "centre": [T.Resize(shorter_side(size), interpolation=how), T.CenterCrop(size)],
    }
    return T.Compose([*parts[said.resize], T.ToTensor(), T.Normalize(said.mean, said.std)])


def shorter_side(size: int) -> int:
    """What `centre` makes of a picture's shorter side, in pixels."""
    return int(SHORTER * size)


def augmented(size: int, normalisation: str) -> Transform:
    """A random part of 8 to 100 % at a ratio of 3/4 to 4/3, bicubic, mirrored or not, its colours shaken: FGVC."""
    from torchvision import transforms as T

    crop = T.RandomResizedCrop(size, interpolation=T.InterpolationMode.BICUBIC)
    colours = T.ColorJitter(0.4, 0.4, 0.4)
    normalise = T.Normalize(*NORMALISATIONS[normalisation])
    return T.Compose([crop, T.RandomHorizontalFlip(), colours, T.ToTensor(), normalise])
