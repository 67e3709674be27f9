"""The worst mistakes of a run: the test images that it got wrong with the most confidence, to look at.

RUN/mistakes/
    0000.png ...      thumbnails
    mistakes.json     for each: file, image (its name in the source), true, predicted, confidence
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from snell_dist.data import Images
from snell_dist.evaluate import Measured

LARGEST = 160  # pixels a side


def save(folder: Path, images: Images, measured: Measured, classes: Sequence[str], count: int = 12) -> None:
    """Writes RUN/mistakes, whole or not at all; an older one is replaced."""
    wrong = (measured.predicted != measured.label).nonzero().flatten()
    worst = wrong[measured.confidence[wrong].argsort(descending=True, stable=True)][:count].tolist()
    temporary, final = folder / ".mistakes.tmp", folder / "mistakes"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    said = []
    for number, index in enumerate(worst):
        picture = images.picture(index).convert("RGB")
        picture.thumbnail((LARGEST, LARGEST))
        picture.save(temporary / f"{number:04d}.png", optimize=True)
        said.append(
            {
                "file": f"{number:04d}.png",
                "image": images.name(index),
                "true": classes[int(measured.label[index])],
                "predicted": classes[int(measured.predicted[index])],
                "confidence": measured.confidence[index].item(),
            }
        )
    (temporary / "mistakes.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
