"""What reading images costs: decoding rates of the data sources, and how long training waits for them, in one run.

    python profiling/bench_data.py [--images 600] [--rounds 5] [--steps 6] [--out profiling/results/data]

The images are JPEG cuts of 256 to 500 pixels a side from the photographs in scikit-image and scikit-learn; every source
reads the same files in the same random order (the stream in its own), in one process, to a picture or to the tensor
that FGVC's evaluation takes.

ImageFolder   torchvision's
files         data.name=image_folder
tar           data.name=webdataset, a pack of it
stream        webdataset's own pipeline over the same shards, in the shards' order

The sources take turns within a round; figures are medians over rounds, with the least and the most, and ratios are the
medians of each round's own ratio. Waiting is the share of the wall time of ViT-B/16's training steps (SNELL-8, batch 8,
augmented images) that passes before the next batch is there; the first step is not counted.
Writes OUT.json, OUT.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import environment
from PIL import Image
from torch.nn import functional as F

import snell_dist
from snell_dist.data import Images
from snell_dist.data.image_folder import ImageFolder
from snell_dist.data.webdataset import Webdataset
from snell_dist.data_tools.pack import Limit, pack
from snell_dist.feed import Feed

RIVAL = "ImageFolder"
SHARDS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="training steps to measure, for each number of readers")
    parser.add_argument("--out", type=Path, default=Path("profiling/results/data"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root / "files", args.images)
        section = ImageFolder(name="image_folder", root=str(root / "files"), batch_size=8)
        pack(section, root / "tar", Limit(images=-(-args.images // SHARDS)))
        report = {
            "environment": environment()
            | {"libraries": {n: version(n) for n in ("torchvision", "pillow", "webdataset")}},
            "threads": torch.get_num_threads(),
            "images": args.images,
            "mean_kib": statistics.mean(f.stat().st_size for f in (root / "files" / "train").rglob("*.jpg")) / 1024,
            "rates": [rates(root, args.rounds, decoded) for decoded in (True, False)],
            "waiting": [waiting(root / "tar", workers, args.steps) for workers in (1, 2)],
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    args.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))
    return 0


def write_photographs(root: Path, count: int) -> None:
    """Cuts by turns from each photograph: `count` in train; one a class in val and in test, which nothing reads."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    photographs = [*load_sample_images().images, data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    draw = np.random.default_rng(0)
    places = [("train", i) for i in range(count)] + [(s, i) for s in ("val", "test") for i in range(len(photographs))]
    for split, i in places:
        photograph = photographs[i % len(photographs)]
        height, width = (int(draw.integers(256, min(500, side) + 1)) for side in photograph.shape[:2])
        top, left = (int(draw.integers(photograph.shape[n] - cut + 1)) for n, cut in enumerate((height, width)))
        file = root / split / f"photograph {i % len(photographs)}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph[top : top + height, left : left + width]).save(file, quality=90)


def rates(root: Path, rounds: int, decoded: bool) -> dict[str, Any]:
    """Images a second of each source, to a picture or to a tensor."""
    readers = contenders(root, decoded)
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    count = 0
    for n in range(rounds + 1):
        names = list(readers)
        for name in names if n % 2 else reversed(names):  # nobody is always the first
            begin = time.perf_counter()
            count = sum(1 for _ in readers[name]())
            seconds[name].append(time.perf_counter() - begin)
    found = {name: [count / s for s in all_s[1:]] for name, all_s in seconds.items()}  # the first round warms up
    return {
        "to": "picture" if decoded else "tensor",
        "per_second": {n: {"median": statistics.median(r), "least": min(r), "most": max(r)} for n, r in found.items()},
        "ratio": {n: statistics.median(a / b for a, b in zip(r, found[RIVAL], strict=True)) for n, r in found.items()},
    }


def contenders(root: Path, decoded: bool) -> dict[str, Callable[[], Iterator[Any]]]:
    """Passes over all training images."""
    from torchvision.datasets import ImageFolder as Rival
    from webdataset import WebDataset

    section = ImageFolder(name="image_folder", root=str(root / "files"))
    transform = None if decoded else section.transforms().evaluation
    rival = Rival(str(root / "files" / "train"), transform=transform)
    files = ImageFolder(name="image_folder", root=str(root / "files"), augment=False).load(False).train
    tar = Webdataset(name="webdataset", root=str(root / "tar"), augment=False).load(False).train
    order = np.random.default_rng(1).permutation(len(rival)).tolist()
    shards = sorted(map(str, (root / "tar").glob("train-*.tar")))

    def passing(images: Images) -> Iterator[Any]:
        return (images.picture(i) if decoded else images[i] for i in order)

    def stream() -> Iterator[Any]:
        for (picture,) in WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg"):
            yield transform(picture) if transform else picture

    return {
        RIVAL: lambda: (rival[i] for i in order),
        "files": lambda: passing(files),
        "tar": lambda: passing(tar),
        "stream": stream,
    }


def waiting(pack: Path, workers: int, steps: int) -> dict[str, Any]:
    """The share of ViT-B/16's training time that passes without a batch, with so many reading processes."""
    import timm

    torch.manual_seed(0)
    data = Webdataset(name="webdataset", root=str(pack), batch_size=8, workers=workers)
    splits = data.load(False)
    model = timm.create_model("vit_base_patch16_224", num_classes=len(splits.classes))
    model = snell_dist.adapt(model, "snell", rank=8, sparsity=0.9, also_train=["head"]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    feed = Feed(splits.train, data, 0, 0, steps + 1)
    begin = 0.0
    for step in range(steps + 1):
        if step == 1:
            feed.waited_s()
            begin = time.perf_counter()
        for batch in feed.step():
            F.cross_entropy(model(batch.images), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    wall = time.perf_counter() - begin
    waited = feed.waited_s()
    print(f"{workers} readers: {waited:.3f} of {wall:.1f} s", file=sys.stderr)
    return {"workers": workers, "steps": steps, "wall_s": wall, "waited_s": waited, "share": waited / wall}


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "| source | to | images a second | least to most | **of ImageFolder** |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for found in report["rates"]:
        for name, rate in found["per_second"].items():
            spread = f"{rate['least']:.0f} to {rate['most']:.0f}"
            lines.append(
                f"| {name} | {found['to']} | {rate['median']:.0f} | {spread} | **{found['ratio'][name]:.2f}** |"
            )
    lines += ["", "| reading processes | steps of ViT-B/16 | seconds a step | **waiting for images** |"]
    lines += ["| ---: | ---: | ---: | ---: |"]
    for w in report["waiting"]:
        lines.append(f"| {w['workers']} | {w['steps']} | {w['wall_s'] / w['steps']:.2f} | **{w['share']:.2%}** |")
    said = report["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in (said["versions"] | said["libraries"]).items())
    images = f"{report['images']} JPEG files of {report['mean_kib']:.0f} KiB on average"
    tail = f"{said['date']}, {said['machine']}, {images}, Python {said['python']}, {versions}. `{said['command']}`"
    return "\n".join([*lines, "", tail, ""])


if __name__ == "__main__":
    sys.exit(main())
