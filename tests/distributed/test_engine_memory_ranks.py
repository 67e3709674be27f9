"""Each engine's model of memory and of the wire against what two and four real processes hold and send.

FSDP2 also against torch's own sharding for the first of up to 1024 ranks, which are pretended.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from footprints import count, pretend
from ranks import together

from snell_dist.config import load
from snell_dist.engines import Job, Share
from snell_dist.footprint import HELD, Category, Footprint, Moment, Phase, Weight
from snell_dist.run_config import Run

pytestmark = [pytest.mark.xdist_group("engine memory"), pytest.mark.timeout(1200)]
SMALL = [
    "backbone.weights=null", "backbone.width=64", "backbone.depth=4", "backbone.heads=2", "train.device=cpu",
    "optim.clip_norm=1.0",
]  # fmt: skip
# Matrices of which ZeRO-3 divides some, and more than one bucket of gradients.
WIDE = [*SMALL[:1], "backbone.width=384", "backbone.depth=5", *SMALL[3:]]
METHODS = {
    "snell": ["method.rank=8"],
    "lora": ["method.name=lora", "method.rank=8"],
    "sparse": ["method.name=sparse"],
    "full": ["method.name=full"],
}
FSDP, ZERO = ["engine.name=fsdp"], ["engine.name=zero"]
ENGINES = {
    "ddp": ["engine.name=ddp"],
    "fsdp": FSDP,
    "fsdp_keep": [*FSDP, "engine.reshard=false"],
    "fsdp_replicate": [*FSDP, "engine.frozen=replicate"],
    "fsdp_offload": [*FSDP, "engine.frozen=offload"],
    **{f"zero{stage}": [*ZERO, f"engine.stage={stage}"] for stage in range(4)},
    "zero2_offload": [*ZERO, "engine.stage=2", "engine.offload_optimizer=true"],
    "zero3_offload": [*ZERO, "engine.stage=3", "engine.frozen=offload"],
}
HYBRID = {"hybrid": [*FSDP, "engine.replicas=2"], "ddp": ENGINES["ddp"], "zero2": ENGINES["zero2"]}
TWICE = "data.micro_batch_size=2"  # two micro-batches a step
REMAT = "remat.policy=block"
# With ranks that are pretended: matrices as of a ViT-B, so that factors are [768, 8]; all digits, of which 1024 a step.
BASE = [
    *SMALL[:1], "backbone.width=768", "backbone.depth=2", *SMALL[3:], "data.classes=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]",
]  # fmt: skip
MANY = 8, 64, 1024
# Rounding of what is smaller than any tensor of the model: norms, flags, the loss.
NEAR = 0.01
# The highest moment of one process is where a block's gradients are there; here they are not, and another is higher.
ELSEWHERE = {"ddp-full-four": 0.03}
# DeepSpeed keeps a part of what a recomputation gathered for the backward after it; here all is gathered again.
MORE_SENT = {"zero3-lora-wide-remat": 0.13}


@dataclass(frozen=True)
class Case:
    alone: str  # the case's name without the engine: what one process does with a rank's images
    overrides: list[str]
    ranks: int
    images: int = 4  # of a rank, in a step
    pretended: bool = False

    @property
    def engine(self) -> list[str]:
        return [*self.overrides, f"data.batch_size={self.images * self.ranks}"]

    @property
    def one(self) -> list[str]:
        return [*(s for s in self.overrides if not s.startswith("engine.")), f"data.batch_size={self.images}"]


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}

    def add(engine: str, said: list[str], method: str, kind: str, *more: str, ranks: int, **options: Any) -> None:
        overrides = [*more, *said, *METHODS[method]]
        found[f"{engine}-{method}{kind}"] = Case(f"one-{method}{kind}", overrides, ranks, **options)

    for engine, said in ENGINES.items():
        for method in METHODS if engine in ("ddp", "fsdp", "zero3") else ("snell", "full"):
            add(engine, said, method, "", *SMALL, ranks=2)
    for engine in ("ddp", "fsdp", "zero2", "zero3"):
        add(engine, ENGINES[engine], "lora", "-twice", *SMALL, TWICE, ranks=2)
    for engine, method in (("fsdp", "lora"), ("zero1", "full"), ("zero3", "lora"), ("zero3", "full")):
        add(engine, ENGINES[engine], method, "-wide", *WIDE, ranks=2, images=2)
    for engine in ("ddp", "fsdp"):
        add(engine, ENGINES[engine], "lora", "-remat", *SMALL, REMAT, ranks=2)
    add("zero3", ENGINES["zero3"], "lora", "-wide-remat", *WIDE, REMAT, ranks=2, images=2)
    for engine, said in HYBRID.items():
        for method in ("snell", "full"):
            add(engine, said, method, "-four", *SMALL, ranks=4, images=2)
    for ranks in MANY:
        for engine, method in (("fsdp", "snell"), ("fsdp_replicate", "lora")):
            name = f"{engine}-{ranks}"
            add(name, ENGINES[engine], method, "-base", *BASE, ranks=ranks, images=1, pretended=True)
    return found


CASES = cases()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("footprints")
    together(1, count, {case.alone: case.one for case in CASES.values()}, folder)
    for ranks in (2, 4):
        together(ranks, count, plan(ranks, pretended=False), folder)
    together(1, pretend, {ranks: plan(ranks, pretended=True) for ranks in MANY}, folder)
    return folder


def plan(ranks: int, pretended: bool) -> dict[str, list[str]]:
    return {n: c.engine for n, c in CASES.items() if (c.ranks, c.pretended) == (ranks, pretended)}


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """What every rank saw."""
    return json.loads((folder / f"{name}.json").read_text())


def predicted(folder: Path, name: str) -> Share:
    """From what one process saw of the same settings without the engine."""
    case = CASES[name]
    (one,) = read(folder, case.alone)
    weights = [Weight(**w | {"shape": tuple(w["shape"])}) for w in one["weights"]]
    job = Job(weights, one["blocks"], case.ranks, case.ranks, 2 if TWICE in case.overrides else 1, "cpu")
    return load("demo", case.engine, Run).config.engine.share(footprint(one, REMAT in case.overrides), job)


def footprint(one: dict[str, Any], recomputes: bool) -> Footprint:
    frozen = sum(w["bytes"] for w in one["weights"] if not w["trains"])
    trains = sum(w["bytes"] for w in one["weights"] if w["trains"])
    held = {
        Category.FROZEN: frozen,
        Category.TRAINABLE: trains,
        Category.OPTIMIZER: one["held"] - frozen - trains,
    }
    inputs, moments = one["moments"][0]["highest"] - one["held"], []
    for seen in one["moments"][1:-1]:
        phase = Phase(seen["phase"])
        if recomputes and phase == Phase.BACKWARD and seen["block"]:
            phase = Phase.RECOMPUTE
        kind = Category.TEMPORARY if phase == Phase.STEP else Category.ACTIVATIONS

        def split(live: int, gradients: int, kind: Category = kind) -> dict[Category, int]:
            rest = live - one["held"] - inputs - gradients
            return held | {Category.GRADIENTS: gradients, Category.INPUTS: inputs, kind: rest}

        highest, start = split(seen["highest"], seen["gradients"]), split(seen["start"], seen["gradients_at_start"])
        moments.append(Moment(phase, seen["block"], "", highest, start))
    return Footprint(moments, held, [])


@pytest.mark.parametrize("case", CASES)
def test_held_between_steps(case: str, found: Path) -> None:
    mine = predicted(found, case).footprint.held
    theirs = max(rank["held"] for rank in read(found, case))
    assert sum(mine.get(c, 0) for c in HELD) == pytest.approx(theirs, rel=NEAR)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.pretended])
def test_with_buckets_and_what_stays_gathered(case: str, found: Path) -> None:
    """All that is alive between steps, without what the process itself has besides."""
    (one,) = read(found, CASES[case].alone)
    besides = one["moments"][0]["highest"] - one["held"]
    theirs = max(rank["moments"][0]["highest"] for rank in read(found, case)) - besides
    assert sum(predicted(found, case).footprint.held.values()) == pytest.approx(theirs, rel=NEAR)


@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_a_step(case: str, found: Path) -> None:
    theirs = max(moment["highest"] for rank in read(found, case) for moment in rank["moments"])
    assert predicted(found, case).footprint.peak_bytes == pytest.approx(theirs, rel=ELSEWHERE.get(case, NEAR))


@pytest.mark.parametrize("case", CASES)
def test_bytes_on_the_wire(case: str, found: Path) -> None:
    """Sums of a few numbers (the norm, whether all is finite) are sent besides."""
    wire, share = read(found, case)[0]["wire"], predicted(found, case)
    theirs = sum((2 if name == "allreduce" else 1) * size * (ranks - 1) // ranks for name, size, ranks in wire)
    assert share.wire_bytes == pytest.approx(theirs, rel=MORE_SENT.get(case, NEAR))
    if not case.startswith("zero"):
        assert share.messages == len(wire)
