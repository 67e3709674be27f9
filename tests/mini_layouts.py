"""Miniature datasets in the true layouts of VTAB-1k and FGVC, from scikit-learn's digits."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from snell_dist.data import fgvc


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 40] uint8, not square on purpose, and labels."""
    images, labels = load_digits(return_X_y=True)
    big = images.reshape(-1, 8, 8).repeat(4, 1).repeat(5, 2)
    return (big * 15).astype(np.uint8), labels


def write_vtab(root: Path, datasets: Iterable[str], train: int = 40, val: int = 10, test: int = 40) -> None:
    """Labels are the digit, as far as the dataset has so many classes."""
    for dataset in datasets:
        folder = root / dataset
        lines = _images(folder, train + val + test, "images/test", classes=10)
        short = [f"{name} {label % _classes(dataset)}\n" for name, label in lines]
        (folder / "train800.txt").write_text("".join(short[:train]))
        (folder / "val200.txt").write_text("".join(short[train : train + val]))
        (folder / "train800val200.txt").write_text("".join(short[: train + val]))
        (folder / "test.txt").write_text("".join(short[train + val :]))


def write_fgvc(root: Path, datasets: Iterable[str], train: int = 40, val: int = 10, test: int = 40) -> None:
    """Class ids from 1, as CUB's."""
    for dataset in datasets:
        folder = root / fgvc.SPELLINGS[dataset][0]
        inside = {"cub": "images", "nabirds": "images", "stanforddog": "Images"}.get(dataset, ".")
        listed = _images(folder / inside, train + val + test, "part", classes=10)
        edges = {"train": (0, train), "val": (train, train + val), "test": (train + val, len(listed))}
        for split, (first, last) in edges.items():
            said = {name: label + 1 for name, label in listed[first:last]}
            (folder / f"{split}.json").write_text(json.dumps(said))


def _images(root: Path, count: int, folder: str, classes: int) -> list[tuple[str, int]]:
    """Writes the first `count` digits below `classes` as PNG; their names and labels."""
    (root / folder).mkdir(parents=True)
    images, labels = digits()
    chosen = [i for i, label in enumerate(labels) if label < classes][:count]
    for i in chosen:
        Image.fromarray(images[i]).save(root / folder / f"{i:04d}.png")
    return [(f"{folder}/{i:04d}.png", int(labels[i])) for i in chosen]


def _classes(dataset: str) -> int:
    from snell_dist.data.vtab import DATASETS

    return DATASETS[dataset][0]
