"""Memory of a training step, predicted: SNELL against LoRA, full sparse tuning, full tuning and a linear probe.

    python profiling/compare.py [--quick] [--out profiling/results/memory]

Each method on ViT-B, L and H, on the image towers of CLIP L, H and bigG, and on a ViT like that of 22 billion
parameters, by batch, precision and recomputation, on one GPU that holds all of the model. Nothing is launched: the step
runs on the meta device, so that a laptop does. Writes OUT.html, OUT.csv, OUT.png, OUT.md.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from demo import environment
from rich.progress import track

from snell_dist.config import check
from snell_dist.memory.gpus import GIB, in_words
from snell_dist.memory.overhead import Overhead
from snell_dist.memory.predict import Prediction, Predictor
from snell_dist.remat import Remat
from snell_dist.report.memory import Page, Row, write
from snell_dist.run_config import Run

METHODS: dict[str, dict[str, Any]] = {
    "SNELL-8": {"name": "snell", "rank": 8},
    "LoRA-8": {"name": "lora", "rank": 8},
    "sparse": {"name": "sparse"},
    "full": {"name": "full"},
    "linear": {"name": "linear"},
    "SNELL-16": {"name": "snell", "rank": 16},
    "SNELL-32": {"name": "snell", "rank": 32},
}
BACKBONES = {
    "ViT-B/16": {"name": "vit", "size": "base"},
    "ViT-L/16": {"name": "vit", "size": "large"},
    "ViT-H/14": {"name": "vit", "size": "huge"},
    "CLIP L/14": {"name": "clip", "size": "ViT-L-14"},
    "CLIP H/14": {"name": "clip", "size": "ViT-H-14"},
    "CLIP bigG/14": {"name": "clip", "size": "ViT-bigG-14"},
    "ViT-22B": {"name": "vit", "size": "22b"},
}
EXPLICIT = ["ViT-B/16", "ViT-L/16", "ViT-H/14"]  # with attention written out, too
SETTINGS = [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "block")]  # precision, what is recomputed
RIVALS = {"LoRA-8": "LoRA-8", "sparse": "full sparse tuning", "full": "full tuning"}
BATCH = 8
NOTES = (
    "sparse: full sparse tuning; 1% of the entries train, and their deltas, gradients and moments are stored densely.",
    "bfloat16: products by autocast and the frozen base stored so; what trains, its gradients and moments are float32.",
    f"An estimate of what only a GPU adds is no part of the bytes shown, but of “fits on”: {Overhead()}.",
    "Beside the paper's own tables of memory: profiling/paper_memory.py.",
)


@dataclass(frozen=True)
class Case:
    backbone: str
    precision: str = "float32"
    remat: str = "none"
    attention: str = "fused"

    def config(self, method: str, batch: int) -> Run:
        backbone = {**BACKBONES[self.backbone], "attention": self.attention}
        return config(backbone, METHODS[method], batch, self.precision, self.remat)


def config(backbone: dict[str, Any], method: dict[str, Any], batch: int, precision: str, remat: str) -> Run:
    """A run's configuration from two sections and what varies besides."""
    tree = {
        "backbone": backbone,
        "method": method,
        "data": {"name": "image_folder", "root": "data/images", "batch_size": batch},
        "precision": {"compute": precision, "frozen": precision},
        "remat": {"policy": remat},
        "train": {"epochs": 1},
    }
    return check(tree, Run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ViT-B alone, at batch 8 in float32")
    parser.add_argument("--out", type=Path, default=Path("profiling/results/memory"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    predictions = dict(track(predicted(quick=args.quick), "predicting", total=None))
    rows = [row(*key, prediction) for key, prediction in predictions.items()]
    page = Page(
        title="What fine-tuning takes",
        ran=ran(),
        sentences=list(sentences(rows)),
        rows=rows,
        series="method",
        over="batch",
        beside="sparse",
        config=yaml.safe_dump(Case("ViT-B/16").config("SNELL-8", BATCH).model_dump(), sort_keys=False),
        notes=NOTES,
    )
    for file in write(page, args.out):
        print(f"{file}  {in_words(file.stat().st_size)}")
    return 0


def ran() -> dict[str, str]:
    said = environment()
    versions = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    return {
        "date": said["date"],
        "machine": said["machine"],
        "versions": f"Python {said['python']}, {versions}",
        "command": said["command"],
    }


def predicted(quick: bool) -> Iterator[tuple[tuple[str, Case, int], Prediction]]:
    """Every model at batch 8; the first two by batch, and three with attention written out."""
    backbones, settings = (list(BACKBONES)[:1], SETTINGS[:1]) if quick else (list(BACKBONES), SETTINGS)
    cases = [Case(backbone, *setting) for backbone, setting in itertools.product(backbones, settings)]
    cases += [Case(backbone, attention="explicit") for backbone in backbones if backbone in EXPLICIT]
    for case in cases:
        varied = case.backbone in backbones[:2] and case.attention == "fused" and not quick
        for method in METHODS:
            for batch in (BATCH, 1, 32, 128) if varied else (BATCH,):
                policy = Remat(policy=case.remat)
                yield (
                    (method, case, batch),
                    predictor(method, replace(case, remat="none")).predict(batch, policy=policy),
                )


@lru_cache(len(METHODS))
def predictor(method: str, case: Case) -> Predictor:
    """For every recomputation, of cases that follow each other."""
    return Predictor(case.config(method, BATCH))


def row(method: str, case: Case, batch: int, prediction: Prediction) -> Row:
    labels = {
        "method": method,
        "backbone": case.backbone,
        "batch": batch,
        "precision": case.precision,
        "remat": case.remat,
        "attention": case.attention,
    }
    estimated = Overhead().parts(prediction.footprint.peak_bytes, many=False)
    return Row(labels, prediction.trainable_numbers, prediction.footprint, beyond=sum(estimated.values()))


def sentences(rows: Sequence[Row]) -> Iterator[str]:
    """The findings: SNELL-8 against its rivals, and what fits on which card."""
    by_labels = {tuple(row.labels.values()): row for row in rows}
    backbones = list(dict.fromkeys(str(row.labels["backbone"]) for row in rows))

    def peak(method: str, backbone: str) -> int:
        return by_labels[method, backbone, BATCH, "float32", "none", "fused"].peak_bytes

    ratios = {m: sorted(peak("SNELL-8", b) / peak(m, b) for b in backbones) for m in RIVALS}
    spread = ", ".join(f"{found[0]:.2f} to {found[-1]:.2f} × {RIVALS[m]}'s" for m, found in ratios.items())
    yield f"At batch {BATCH} in float32 a step of SNELL-8 peaks, over {len(backbones)} models, at {spread}."
    for backbone in dict.fromkeys((backbones[0], backbones[-1])):
        rivals = ", ".join(f"{words} {in_words(peak(m, backbone))}" for m, words in RIVALS.items())
        yield f"{backbone}: SNELL-8 {in_words(peak('SNELL-8', backbone))}, {rivals}."
    recomputed = [row for row in rows if row.labels["remat"] == "block" and row.labels["batch"] == BATCH]
    for card in (24, 80) if recomputed else ():
        largest = {
            method: max((row for row in recomputed if fits(row, method, card)), key=size, default=None)
            for method in ("SNELL-8", "LoRA-8", "sparse", "full")
        }
        words = ", ".join(f"{m} {row.labels['backbone'] if row else 'none of them'}" for m, row in largest.items())
        yield f"The largest model that trains on {card} GiB at batch {BATCH}, in bfloat16 and recomputed: {words}."


def fits(row: Row, method: str, card_gib: int) -> bool:
    return row.labels["method"] == method and row.peak_bytes + row.beyond <= card_gib * GIB


def size(row: Row) -> int:
    return row.peak_bytes


if __name__ == "__main__":
    sys.exit(main())
