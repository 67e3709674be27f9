"""What ran out of memory, by the plan, and the cheapest changes that would have it fit, each with its predicted saving.

`python -m snell_dist.memory.remedies FOLDER` reads config.yaml and failure.json there and writes diagnosis.json: a
process of its own, since the one that failed has no memory to spare and is one of many.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from snell_dist import dist
from snell_dist.config import ConfigError, load
from snell_dist.engines import Job, Share
from snell_dist.engines.fsdp import Fsdp
from snell_dist.footprint import Footprint, Phase
from snell_dist.memory import words
from snell_dist.memory.device import Figures
from snell_dist.memory.gpus import MIB
from snell_dist.memory.plan import Line
from snell_dist.memory.predict import Prediction, Predictor
from snell_dist.memory.standin import AMPERE
from snell_dist.memory.timeline import Birth
from snell_dist.run_config import Run

CONFIG, FAILURE, DIAGNOSIS = "config.yaml", "failure.json", "diagnosis.json"
SHOWN = 3  # changes
# Of the room, a change may fill so much. The C library's heap breaks into more pieces than CUDA's allocator, and on the
# CPU the peak is recorded in the third step (`measure`), which takes so much.
MARGIN, MARGIN_CPU, RECORDING = 0.95, 0.8, 160 * MIB
LEAST = 0.01  # of the peak, for a saving that is worth a word


@dataclass(frozen=True)
class Failure:
    """What the process that failed knows of it.

    phase: None outside of a step's computation. sure: whether `module` was at work, or is where backward had come to by
    the gradients that are there. asked: bytes of the request, as the allocator says them, up to `rounding` less.
    held: of weights and optimizer state; gradients: bytes; process, limits: bytes of the host's, by name.
    """

    message: str
    rank: int
    ranks: int
    ranks_per_node: int
    host: str
    device_type: str
    capability: tuple[int, int] | None
    place: str  # what the rank was doing, in people's words
    step: int
    phase: Phase | None
    block: str
    module: str
    kind: str  # the module's class
    sure: bool
    asked: int | None
    rounding: int
    images: int  # of a step, on this rank
    micro_batch_size: int
    eval_batch_size: int
    held: int
    gradients: int
    figures: Figures
    process: dict[str, int] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    snapshot: str | None = None

    @property
    def micro_batches(self) -> int:
        return self.images // self.micro_batch_size

    @property
    def plans_for(self) -> str:
        """The type of device by whose kernels the plan goes."""
        return "cpu" if self.device_type == "cpu" else "cuda"

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Failure:
        said = json.loads(text)
        said["phase"] = said["phase"] and Phase(said["phase"])
        said["capability"] = said["capability"] and tuple(said["capability"])
        return cls(**said | {"figures": Figures(**said["figures"])})


@dataclass(frozen=True)
class Change:
    """`overrides`: as they are typed. resumes: whether the run can go on from its checkpoint with them."""

    overrides: list[str]
    peak_bytes: int
    saves: int
    fits: bool
    costs: str
    resumes: bool


@dataclass(frozen=True)
class Diagnosis:
    """By the plan. asked_for: categories of requests of that size there. live: bytes before the request, at least."""

    peak_bytes: int
    peak: str
    categories: str
    asked_for: list[str]
    live: int | None
    changes: list[Change]

    @classmethod
    def from_json(cls, text: str) -> Diagnosis:
        said = json.loads(text)
        return cls(**said | {"changes": [Change(**each) for each in said["changes"]]})


@dataclass(frozen=True)
class _Candidate:
    """A change that has not been weighed. micro_batch_size: None for the largest that fits."""

    overrides: tuple[str, ...]
    costs: str
    resumes: bool
    micro_batch_size: int | None


def diagnose(file: Path, failure: Failure) -> Diagnosis:
    """Of the configuration in that file. ConfigError where it cannot be predicted."""
    case = _Case(file, failure)
    own = case.weigh((), failure.micro_batch_size)
    births = case.requests(own)
    alike = [birth for birth in births if _alike(birth.size, failure)]
    live = _live(own, failure, alike or births)
    changes = [] if failure.phase is None else _cheapest(case, own, _room(failure, live))
    return Diagnosis(
        own.share.footprint.peak_bytes,
        words.where(own.share.footprint.peak),
        words.categories(own.share.footprint.peak.bytes),
        list(dict.fromkeys(birth.category.value for birth in alike)),
        live,
        changes,
    )


@dataclass(frozen=True)
class _Weighed:
    config: Run
    predictor: Predictor
    prediction: Prediction
    share: Share

    @property
    def peak_bytes(self) -> int:
        return self.share.footprint.peak_bytes

    @property
    def flops_per_image(self) -> float:
        return self.prediction.flops / (self.prediction.micro_batch_size * self.prediction.micro_batches)


class _Case:
    """Predicts variants of the configuration that failed, for the rank that failed."""

    def __init__(self, file: Path, failure: Failure) -> None:
        self._file, self.failure = file, failure
        self._predictors: dict[str, Predictor] = {}

    def load(self, overrides: Sequence[str]) -> Run:
        config = load(str(self._file), overrides, Run).config
        config.engine.check(config.precision, config.optim)
        return config

    def weigh(self, overrides: Sequence[str], micro_batch_size: int) -> _Weighed:
        """ConfigError where they do not fit each other."""
        config = self.load(overrides)
        predictor = self.predictor(config)
        passes = self.failure.images // micro_batch_size
        prediction = predictor.predict(micro_batch_size, min(passes, 2), config.remat)
        return _Weighed(config, predictor, prediction, self.share(config, predictor, prediction.footprint, passes))

    def line(self, overrides: Sequence[str], largest: int) -> Line:
        config = self.load(overrides)
        return Line(self.predictor(config), largest, 2, config.remat)

    def predictor(self, config: Run) -> Predictor:
        """Recomputation and engine are no matter of it, so most variants share one."""
        key = config.model_dump_json(include={"backbone", "method", "precision", "optim", "task"})
        if key not in self._predictors:
            failure = self.failure
            self._predictors[key] = Predictor(config, failure.plans_for, failure.capability or AMPERE)
        return self._predictors[key]

    def share(self, config: Run, predictor: Predictor, footprint: Footprint, passes: int) -> Share:
        failure = self.failure
        ranks = failure.ranks, failure.ranks_per_node
        job = Job(predictor.weights, predictor.blocks, *ranks, passes, failure.plans_for)
        return config.engine.share(footprint, job)

    def requests(self, own: _Weighed) -> list[Birth]:
        """What the module asks for in the plan; `live` is this rank's."""
        failure = self.failure
        if failure.phase is None or not (failure.module or failure.phase == Phase.STEP):
            return []
        passes = own.prediction.micro_batches
        births = own.predictor.births(failure.phase, failure.module, failure.micro_batch_size, passes)
        divided = _divided(own, failure)
        return [Birth(b.category, b.size, b.live + divided) for b in births]


def _alike(size: int, failure: Failure) -> bool:
    """Whether a request of that size is the one that failed."""
    if failure.asked is None:
        return False
    if failure.device_type == "cuda":
        size = segment(size)
    return abs(size - failure.asked) <= failure.rounding


def segment(size: int) -> int:
    """What CUDA's allocator asks the device for, for a tensor of that size."""
    return 2 * MIB if size <= MIB else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


def _live(own: _Weighed, failure: Failure, births: Sequence[Birth]) -> int | None:
    """Before the request; where it is not known, when its phase began."""
    if births:
        return min(birth.live for birth in births)
    first = next((m for m in own.prediction.footprint.moments if m.phase == failure.phase), None)
    return None if first is None else sum(first.start.values()) + _divided(own, replace(failure, block=first.block))


def _room(failure: Failure, live: int | None) -> int | None:
    """Bytes that a change may need at its peak: what was live, and failed with more, less some slack."""
    there = failure.figures.allocated or live
    if there is None:
        return None
    return round(MARGIN_CPU * there) - RECORDING if failure.device_type == "cpu" else round(MARGIN * there)


def _divided(own: _Weighed, failure: Failure) -> int:
    """How much more a rank has than the whole model's one process, while that block is at work in that phase."""
    there = failure.phase, failure.block
    mine, whole = (
        next((m.total for m in footprint.moments if (m.phase, m.block) == there), 0)
        for footprint in (own.share.footprint, own.prediction.footprint)
    )
    return mine - whole


def _cheapest(case: _Case, own: _Weighed, room: int | None) -> list[Change]:
    """The first of them that fit; after those, or where nothing is known to, those that save most."""
    found = list[Change]()
    for candidate in _candidates(case, own.config):
        try:
            change = _weighed(case, own, candidate, room)
        except ConfigError:  # a library is missing, or the sections do not go together
            continue
        if change is not None and change.saves > LEAST * own.peak_bytes:
            found.append(change)
        if sum(each.fits for each in found) == SHOWN:
            break
    return sorted(found, key=lambda change: (not change.fits, 0 if change.fits else -change.saves))[:SHOWN]


def _weighed(case: _Case, own: _Weighed, candidate: _Candidate, room: int | None) -> Change | None:
    overrides, size, images = candidate.overrides, candidate.micro_batch_size, case.failure.images
    if size is None:
        smaller = [n for n in range(case.failure.micro_batch_size - 1, 0, -1) if images % n == 0]
        if not smaller:
            return None
        config, line = case.load(overrides), case.line(overrides, smaller[0])
        predictor = case.predictor(config)

        def peak(n: int) -> int:
            return case.share(config, predictor, line.at(n), images // n).footprint.peak_bytes

        size = next((n for n in smaller if room is not None and peak(n) <= room), smaller[-1])
        overrides = (*overrides, f"data.micro_batch_size={size}")
    weighed = case.weigh(overrides, size)
    more = weighed.flops_per_image / own.flops_per_image - 1
    costs = [candidate.costs] if candidate.costs else []
    if size != case.failure.micro_batch_size:
        costs.append(f"{images // size} x {size} images a step")
    if more > LEAST:
        costs.append(f"a step computes {more:.0%} more")
    fits = room is not None and weighed.peak_bytes <= room
    saves = own.peak_bytes - weighed.peak_bytes
    return Change(list(overrides), weighed.peak_bytes, saves, fits, ", ".join(costs), candidate.resumes)


def _candidates(case: _Case, config: Run) -> Iterator[_Candidate]:
    """In the order of what they cost: first what changes no result, then what rounds otherwise, then other methods."""
    failure, size = case.failure, case.failure.micro_batch_size
    yield _Candidate((), "", True, None)
    policies = [name for name in ("selective", "block") if name != config.remat.policy]
    if config.remat.policy == "block":
        policies = [] if config.remat.every == 1 else ["block"]
    every = () if config.remat.every == 1 else ("remat.every=1",)
    for policy in policies:
        yield _Candidate((f"remat.policy={policy}", *every), "", True, size)
    if config.engine.name != "fsdp":
        nodes = failure.ranks // failure.ranks_per_node
        for engine in Fsdp.variants(failure.ranks, nodes):
            if failure.device_type != "cpu" or engine.frozen != "offload":
                said = engine.model_dump(exclude_defaults=True, exclude={"name"})
                overrides = ("engine.name=fsdp", *(f"engine.{key}={value}" for key, value in said.items()))
                costs = "fetched from the host" if engine.frozen == "offload" else "gathered from the other ranks"
                costs = "" if engine.frozen == "replicate" else f"the base is {costs}"
                yield _Candidate(overrides, costs, True, size)
    if policies:
        yield _Candidate(("remat.policy=block", *every), "", True, None)
    if config.precision.compute == "float32":
        compute = "precision.compute=bfloat16"
        yield _Candidate((compute,), "rounds to bfloat16", False, size)
        yield _Candidate((compute, "precision.frozen=bfloat16"), "rounds to bfloat16", False, size)
    if config.precision.frozen in ("float32", "bfloat16"):
        yield _Candidate(("precision.frozen=nf4",), "the base in 4 bits", False, size)
    for method in ("snell", "lora"):
        if config.method.name in ("full", "sparse"):
            yield _Candidate((f"method.name={method}",), "another method", False, size)


def main(folder: Path) -> None:
    dist.end_with_parent()
    failure = Failure.from_json((folder / FAILURE).read_text())
    found = diagnose(folder / CONFIG, failure)
    said: dict[str, Any] = asdict(found)
    (folder / DIAGNOSIS).write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
