"""Will it fit, and how is it best trained: every engine, recomputation and place of the frozen base, side by side.

Memory is predicted (`predict`, and each engine's own share of it); what only a GPU shows is estimated (`overhead`). A
step's cost is a model of a few terms, for comparing options and for nothing else:

    max(compute, wire) + host      compute: counted operations at EFFICIENCY of the data sheet's rate
                                   wire: bytes over the links within a node and between nodes, and LATENCY a message
                                   host: offloaded bytes over PCIe, which nothing hides
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from snell_dist.config import ConfigError, Plugin, UserError
from snell_dist.engines import EngineSection, Job, Share
from snell_dist.footprint import Bytes, Category, Footprint, plain
from snell_dist.memory.gpus import KNOWN, PCIE4, Gpu, in_words
from snell_dist.memory.overhead import Overhead
from snell_dist.memory.predict import Prediction, Predictor
from snell_dist.remat import Remat
from snell_dist.run_config import Run

EFFICIENCY = 0.4  # of the data sheet's rate, which large products reach about
LATENCY = 25e-6  # seconds a message
BETWEEN_NODES = 25e9  # bytes a second and GPU: one 200 Gbit/s adapter each
MOST_IMAGES = 1 << 20
NEAR = 1.02  # a simpler option is taken where it costs at most so much more


@dataclass(frozen=True)
class Machine:
    gpus: int
    nodes: int
    gpu: Gpu

    @property
    def per_node(self) -> int:
        return self.gpus // self.nodes

    def __str__(self) -> str:
        where = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.gpus} x {self.gpu.name} ({in_words(self.gpu.memory)}){where}"


@dataclass(frozen=True)
class Option:
    """One way to train, on the rank that holds most."""

    engine: EngineSection
    remat: Remat
    micro_batch_size: int
    micro_batches: int
    share: Share
    estimated: dict[str, int]  # bytes by name
    step_s: float
    largest: int  # images at once that would fit

    @property
    def footprint(self) -> Footprint:
        return self.share.footprint

    @property
    def bytes(self) -> int:
        """Predicted and estimated."""
        return self.footprint.peak_bytes + sum(self.estimated.values())

    @property
    def words(self) -> str:
        return f"{self.engine}, remat {self.remat.policy}"


@dataclass(frozen=True)
class Plan:
    """`options`: the configuration's own first, then the others, the cheapest first."""

    name: str
    config: Run
    machine: Machine
    classes: int
    options: list[Option]
    choice: Option
    reason: str

    @property
    def own(self) -> Option:
        return self.options[0]

    def fits(self, option: Option) -> bool:
        return option.bytes <= self.machine.gpu.memory


def make(name: str, config: Run, machine: Machine, overhead: Overhead) -> Plan:
    """Raises ConfigError or UserError where the batch does not divide, or nothing fits (naming what is nearest)."""
    accumulation = config.data.accumulation(machine.gpus)
    size = config.data.batch_size // machine.gpus // accumulation
    options: list[Option] = []
    policies = dict.fromkeys([config.remat.policy, "none", "selective", "block"])
    others = [e for e in engines(config, machine.gpus, machine.nodes) if e != config.engine]
    predictor = Predictor(config, capability=machine.gpu.capability)
    for policy in policies:
        remat = config.remat if policy == config.remat.policy else Remat(policy=policy)
        line = Line(predictor, size, min(accumulation, 2), remat)
        for engine in (config.engine, *others):
            options += _options(config, machine, overhead, engine, remat, predictor, line, size)
    ordered = [options[0], *sorted(options[1:], key=lambda option: option.step_s)]
    choice, reason = _choose(ordered, machine)
    return Plan(name, config, machine, predictor.classes, ordered, choice, reason)


def own(config: Run, machine: Machine, overhead: Overhead) -> Option:
    """The configuration as it is, and nothing else: faster than a plan.

    Raises ConfigError where the batch does not divide.
    """
    passes = config.data.accumulation(machine.gpus)
    size = config.data.batch_size // machine.gpus // passes
    predictor = Predictor(config, capability=machine.gpu.capability)
    predicted = predictor.predict(size, min(passes, 2))
    share, estimated = _share(machine, overhead, config.engine, predictor, predicted.footprint, passes)
    seconds = _seconds(config, machine, predicted.flops / predicted.micro_batches * passes, share, passes)
    return Option(config.engine, config.remat, size, passes, share, estimated, seconds, size)


class Line:
    """Footprints by batch size: every moment's bytes grow in a straight line with the images, from two on."""

    def __init__(self, predictor: Predictor, size: int, micro_batches: int, remat: Remat) -> None:
        self._predictor, self._micro_batches, self._remat = predictor, micro_batches, remat
        low = max(size // 2, 2)
        self._ends = [self._predict(n) for n in (low, max(size, 2 * low))]
        self._known = {end.micro_batch_size: end.footprint for end in self._ends}

    @property
    def flops_per_image(self) -> float:
        largest = self._ends[-1]
        return largest.flops / largest.micro_batch_size / largest.micro_batches

    def at(self, size: int) -> Footprint:
        if size not in self._known:
            self._known[size] = self._between(size)
        return self._known[size]

    def _between(self, size: int) -> Footprint:
        low, high = self._ends
        pairs = low.footprint.moments, high.footprint.moments
        if size == 1 or len(pairs[0]) != len(pairs[1]):
            return self._predict(size).footprint
        slope = (size - low.micro_batch_size) / (high.micro_batch_size - low.micro_batch_size)
        moments = [
            replace(two, bytes=_along(one.bytes, two.bytes, slope), start=_along(one.start, two.start, slope))
            for one, two in zip(*pairs, strict=True)
        ]
        return replace(high.footprint, moments=moments)

    def _predict(self, size: int) -> Prediction:
        return self._predictor.predict(size, self._micro_batches, self._remat)


def _options(
    config: Run, machine: Machine, overhead: Overhead, engine: EngineSection, remat: Remat, predictor: Predictor,
    line: Line, size: int,
) -> list[Option]:  # fmt: skip
    """At the configuration's micro-batch; where that does not fit, in as many smaller ones as it takes."""
    images = config.data.batch_size // machine.gpus

    def needed(micro: int) -> tuple[Share, dict[str, int]]:
        return _share(machine, overhead, engine, predictor, line.at(micro), max(images // micro, 1))

    def bytes_of(micro: int) -> int:
        share, estimated = needed(micro)
        return share.footprint.peak_bytes + sum(estimated.values())

    def option(micro: int) -> Option:
        share, estimated = needed(micro)
        seconds = _seconds(config, machine, line.flops_per_image * images, share, images // micro)
        return Option(engine, remat, micro, images // micro, share, estimated, seconds, largest)

    largest = _largest(bytes_of, machine.gpu.memory, size)
    smaller = [n for n in range(1, min(largest, size - 1) + 1) if images % n == 0]
    if largest >= size or size == 1:
        return [option(size)]
    own = engine is config.engine and remat is config.remat
    return [*([option(size)] if own else []), option(smaller[-1] if smaller else 1)]


def _share(
    machine: Machine, overhead: Overhead, engine: EngineSection, predictor: Predictor, whole: Footprint, passes: int
) -> tuple[Share, dict[str, int]]:
    """A rank's share, and what is estimated beside it."""
    job = Job(predictor.weights, predictor.blocks, machine.gpus, machine.per_node, passes, "cuda")
    share = engine.share(whole, job)
    return share, overhead.parts(share.footprint.peak_bytes, machine.gpus > 1)


def _largest(needed: Callable[[int], int], room: int, size: int) -> int:
    """The largest number of images that `needed` bytes leave in the room; 0 where not even one does.

    What is needed is the highest of many straight lines, so a chord never lies above it further on.
    """
    known = {n: needed(n) for n in {2, max(size, 3)}}
    if known[2] > room:
        return int(needed(1) <= room)
    while True:
        fitting = max((n for n in known if known[n] <= room), default=0)
        beyond = min((n for n in known if n > fitting), default=None)
        if not fitting or beyond == fitting + 1 or fitting >= MOST_IMAGES:
            return fitting
        if beyond is None:
            before = max(n for n in known if n < fitting)
            slope = (known[fitting] - known[before]) / (fitting - before)
            reach = fitting + (room - known[fitting]) / slope if slope > 0 else MOST_IMAGES
            guess = min(max(int(reach) + 1, fitting + 1), MOST_IMAGES)
        else:
            slope = (known[beyond] - known[fitting]) / (beyond - fitting)
            guess = int(fitting + (room - known[fitting]) / slope)
            guess = min(max(guess, fitting + 1), beyond - 1)
        known[guess] = needed(guess)


def _seconds(config: Run, machine: Machine, flops: float, share: Share, micro_batches: int) -> float:
    gpu = machine.gpu
    rate = gpu.half if config.precision.compute == "bfloat16" and gpu.bfloat16 else gpu.single
    compute = flops / (EFFICIENCY * rate * 1e12)
    within = share.wire_bytes - share.between_nodes_bytes
    wire = within / (gpu.link * 1e9) + share.between_nodes_bytes / BETWEEN_NODES + share.messages * LATENCY
    return max(compute, wire) + 2 * micro_batches * share.host_bytes / (PCIE4 * 1e9)


def engines(config: Run, gpus: int, nodes: int) -> list[EngineSection]:
    """The variants of every engine that can do this work."""
    plugin = Plugin("engines")
    kinds: list[Any] = [plugin.find(name) for name in plugin.names()]
    return [variant for kind in kinds for variant in kind.variants(gpus, nodes) if _can(variant, config)]


def _can(engine: EngineSection, config: Run) -> bool:
    try:
        engine.check(config.precision, config.optim)
    except ConfigError:
        return False
    return True


def _choose(options: Sequence[Option], machine: Machine) -> tuple[Option, str]:
    fitting = [option for option in options if option.bytes <= machine.gpu.memory]
    if not fitting:
        raise UserError(_nowhere(options, machine))
    fastest = min(fitting, key=lambda option: option.step_s)
    close = [option for option in fitting if option.step_s <= NEAR * fastest.step_s]
    choice = min(close, key=lambda option: (_complexity(option), option.bytes))
    return choice, _reason(choice, options, fitting, machine)


def _nowhere(options: Sequence[Option], machine: Machine) -> str:
    """What comes nearest, and the smallest GPU that has room for it."""
    near = min(options, key=lambda option: option.bytes)
    wider = sorted((gpu.memory, gpu.name) for gpu in KNOWN.values() if gpu.memory >= near.bytes)
    room = f"a GPU of {in_words(wider[0][0])} ({wider[0][1]}) would do" if wider else "none that is known here has that"
    size = near.micro_batch_size
    return (
        f"nothing fits {machine}: the nearest is {near.words}, {size} image{'s' * (size > 1)} at a time, with"
        f" {in_words(near.bytes)} a GPU; {room}"
    )


def _complexity(option: Option) -> tuple[int, int]:
    """How much there is to go wrong: one process's tools first."""
    order = {"ddp": 0, "fsdp": 1, "zero": 2}
    return order.get(option.engine.name, 3), ("none", "selective", "block").index(option.remat.policy)


def _reason(choice: Option, options: Sequence[Option], fitting: Sequence[Option], machine: Machine) -> str:
    room = machine.gpu.memory - choice.bytes
    if choice.engine.name == "ddp" and choice.remat.policy == "none":
        sharded = [o for o in fitting if o.engine.shards and o.remat.policy == "none" and not o.share.host_bytes]
        if machine.gpus == 1 or not sharded:
            size, plain = choice.micro_batch_size, choice.micro_batch_size == options[0].micro_batch_size
            how = "it fits as it is" if plain else f"{size} image{'s' * (size > 1)} at a time fit"
            return f"{how}, with {in_words(room)} to spare; nothing needs dividing or recomputing"
        best = min(sharded, key=lambda option: option.bytes)
        more = best.share.wire_bytes / max(choice.share.wire_bytes, 1)
        return (
            f"DDP is better here: all of it fits with {in_words(room)} to spare, and {best.engine} would"
            f" send {more:,.0f} times as many bytes a step to save {in_words(choice.bytes - best.bytes)}"
        )
    plainer = [o for o in options if _complexity(o) < _complexity(choice) and o.bytes > machine.gpu.memory]
    if plainer:
        least = min(plainer, key=lambda option: option.bytes)
        return f"the cheapest step of those that fit; {least.words} would need {in_words(least.bytes)}"
    return f"the cheapest step of those that fit, with {in_words(room)} to spare"


def delta(plan: Plan) -> dict[str, Any]:
    """What to change in the configuration, as its YAML has it."""
    choice, config = plan.choice, plan.config
    found: dict[str, Any] = {}
    if choice.engine != config.engine:
        found["engine"] = choice.engine.model_dump(exclude_defaults=True) | {"name": choice.engine.name}
    if choice.remat != config.remat:
        found["remat"] = {"policy": choice.remat.policy}
    if choice.micro_batch_size != plan.own.micro_batch_size:
        found["data"] = {"micro_batch_size": choice.micro_batch_size}
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """`peak_bytes` and `categories` are those of the configuration as it is, per rank."""
    own = plan.own
    return {
        "config": plan.name,
        "gpus": plan.machine.gpus,
        "nodes": plan.machine.nodes,
        "gpu": plan.machine.gpu.name,
        "gpu_memory_bytes": plan.machine.gpu.memory,
        **_option_json(plan, own),
        "classes": plan.classes,
        "options": [_option_json(plan, option) for option in plan.options],
        "choice": _option_json(plan, plan.choice),
        "reason": plan.reason,
        "delta": delta(plan),
    }


def _option_json(plan: Plan, option: Option) -> dict[str, Any]:
    peak = option.footprint.peak
    cheapest = min(each.step_s for each in plan.options)
    return {
        "engine": option.engine.model_dump(),
        "remat": option.remat.policy,
        "micro_batch_size": option.micro_batch_size,
        "micro_batches": option.micro_batches,
        "fits": plan.fits(option),
        "peak_bytes": option.footprint.peak_bytes,
        "categories": plain(peak.bytes),
        "peak": {"phase": peak.phase.value, "block": peak.block, "module": peak.module},
        "estimated_bytes": option.estimated,
        "needed_bytes": option.bytes,
        "largest_micro_batch": option.largest,
        "wire_bytes": option.share.wire_bytes,
        "between_nodes_bytes": option.share.between_nodes_bytes,
        "host_bytes": option.share.host_bytes,
        "relative_step": option.step_s / cheapest,
    }


def _along(one: Bytes, two: Bytes, slope: float) -> dict[Category, int]:
    found: Counter[Category] = Counter()
    for category in {*one, *two}:
        first = one.get(category, 0)
        found[category] = max(round(first + slope * (two.get(category, 0) - first)), 0)
    return dict(found)
