"""Memory and traffic of one GPU among many, predicted: the engines side by side, on 1 to 1,024 GPUs.

    python profiling/scaling.py [--quick] [--out profiling/results/scaling]

SNELL-8 on ViT-L and on a ViT like that of 22 billion parameters, in bfloat16 and recomputed block by block, with 1 to
128 images a GPU on nodes of 8. One process's step is predicted, and each engine says what a rank holds, gathers and
sends of it. Nothing is launched. Writes OUT.html, OUT.csv, OUT.png, OUT.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from compare import BACKBONES, ran
from rich.progress import track

from snell_dist.config import check
from snell_dist.engines import EngineSection, Job
from snell_dist.memory.gpus import GIB, MIB, in_words
from snell_dist.memory.overhead import Overhead
from snell_dist.memory.plan import engines
from snell_dist.memory.predict import Predictor
from snell_dist.report.memory import Page, Row, write
from snell_dist.run_config import Run

MODELS = ["ViT-22B", "ViT-L/16"]
GPUS = [64, 1, 8, 1024]  # what the page shows first is the first
IMAGES = [8, 1, 32, 128]  # on each GPU
PER_NODE = 8
WIRE = "wire MiB a step"
NOTES = (
    "A figure is of the rank that holds most. Wire: what it sends in a step when every collective is a ring; of these,"
    f" “between nodes” leave its node of {PER_NODE} GPUs. Host: pinned memory for what is offloaded.",
    f"An estimate of what only a GPU adds is no part of the bytes shown, but of “fits on”: {Overhead()}.",
)


def config(model: str) -> Run:
    tree = {
        "backbone": BACKBONES[model],
        "method": {"name": "snell", "rank": 8},
        "data": {"name": "image_folder", "root": "data/images", "batch_size": IMAGES[0]},
        "precision": {"compute": "bfloat16", "frozen": "bfloat16"},
        "remat": {"policy": "block"},
        "train": {"epochs": 1},
    }
    return check(tree, Run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ViT-L alone, with 8 images a GPU")
    parser.add_argument("--out", type=Path, default=Path("profiling/results/scaling"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    models, images = (MODELS[1:], IMAGES[:1]) if args.quick else (MODELS, IMAGES)
    rows = [row for model in track(models, "predicting") for row in predicted(model, images)]
    page = Page(
        title="One GPU among many",
        ran=ran(),
        sentences=list(sentences(rows)),
        rows=rows,
        series="engine",
        over="GPUs",
        against=WIRE,
        beside="FSDP2 shard",
        config=yaml.safe_dump(config(models[0]).model_dump(), sort_keys=False),
        notes=NOTES,
    )
    for file in write(page, args.out):
        print(f"{file}  {in_words(file.stat().st_size)}")
    return 0


def predicted(model: str, images: Sequence[int]) -> Iterator[Row]:
    predictor = Predictor(config(model))
    for size in images:
        whole = predictor.predict(size)
        for gpus in GPUS:
            job = Job(predictor.weights, predictor.blocks, gpus, min(gpus, PER_NODE), 1, "cuda")
            for engine in engines(config(model), gpus, max(gpus // PER_NODE, 1)):
                share = engine.share(whole.footprint, job)
                labels = {"engine": words(engine), "model": model, "GPUs": gpus, "images a GPU": size}
                estimated = Overhead().parts(share.footprint.peak_bytes, many=gpus > 1)
                figures = {
                    WIRE: share.wire_bytes / MIB,
                    "between nodes MiB": share.between_nodes_bytes / MIB,
                    "messages": share.messages,
                    "host GiB": share.host_bytes / GIB,
                }
                beyond = sum(estimated.values())
                yield Row(labels, whole.trainable_numbers, share.footprint, beyond=beyond, figures=figures)


def words(engine: EngineSection) -> str:
    """Short: the engine, what it divides, and where the frozen base is if one may choose."""
    said = engine.model_dump()
    name = {"ddp": "DDP", "fsdp": "FSDP2", "zero": f"ZeRO-{said.get('stage')}"}[engine.name]
    if said.get("replicas", 1) > 1:
        return f"{name} within nodes"
    return f"{name} {said['frozen']}" if said.get("frozen") else name


def sentences(rows: Sequence[Row]) -> Iterator[str]:
    """The findings: what each model takes whole and divided, what that sends, and on what it fits."""
    for model in dict.fromkeys(str(row.labels["model"]) for row in rows):
        own = [row for row in rows if row.labels["model"] == model and row.labels["images a GPU"] == IMAGES[0]]
        alone = next(row for row in own if row.labels["GPUs"] == 1 and row.labels["engine"] == "DDP")
        many = {str(row.labels["engine"]): row for row in own if row.labels["GPUs"] == max(GPUS)}
        least = min(many, key=lambda engine: many[engine].peak_bytes)
        yield (
            f"{model}, {IMAGES[0]} images a GPU: whole on every GPU (DDP) a step peaks at {in_words(alone.peak_bytes)}"
            f" on one GPU and {in_words(many['DDP'].peak_bytes)} on {max(GPUS):,}, where {least} takes the least,"
            f" {in_words(many[least].peak_bytes)}; a GPU sends {in_words(many['DDP'].figures[WIRE] * MIB)} a step under"
            f" DDP and {in_words(many[least].figures[WIRE] * MIB)} under {least}."
        )


if __name__ == "__main__":
    sys.exit(main())
