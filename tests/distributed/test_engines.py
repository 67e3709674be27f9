"""Every engine gives the numbers of one process that accumulates, and goes on from what any other saved.

Two real processes run all cases of a kind in one group: DeepSpeed's start takes longer than the steps.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import train, trained
from traces import ENGINES, SMALL, follow, trace, weights

from snell_dist.config import Plugin
from snell_dist.doctor.trace import Case

pytestmark = [pytest.mark.xdist_group("engines"), pytest.mark.timeout(1200)]
STEPS = 4


def difference(one: float, other: float) -> float:
    """Relative."""
    return abs(one - other) / abs(other)


METHODS = {
    "snell": ["method.rank=4"],
    "snella": ["method.name=snella", "method.rank=4", 'method.allocator={"target_sparsity": 0.9}', "data.batch_size=8"],
    "lora": ["method.name=lora", "method.rank=4"],
    "sparse": ["method.name=sparse"],
    "full": ["method.name=full", "optim.lr=1e-3"],
}
SGD = ["optim.name=sgd", "optim.lr=0.05", "optim.clip_norm=0.5", "data.micro_batch_size=2"]
# Each engine meets each of the others' peculiarities somewhere: a fair sample of the whole matrix in profiling/.
SAMPLE = [(engine, "snell", remat) for engine in ENGINES for remat in ("none", "block")] + [
    ("fsdp", "snella", "block"), ("zero3", "snella", "none"), ("fsdp", "sparse", "none"), ("zero3", "sparse", "block"),
    ("zero1", "lora", "block"), ("fsdp", "full", "block"), ("zero3", "full", "none"),
]  # fmt: skip
# What a forward leaves for backward, at a width where a kept matrix shows: 12 width^2 numbers a block.
WIDE = [
    "backbone.weights=null", "backbone.width=512", "backbone.depth=2", "backbone.heads=4", "data.batch_size=2",
    "train.device=cpu",
]  # fmt: skip
BLOCK_BYTES = 12 * 512**2 * 4
HELD = [(engine, method) for engine in ("fsdp", "zero3") for method in METHODS]
FAMILIES = [(e, f) for e in ("fsdp", "zero1", "zero3") for f in Plugin("backbones").names()]
CLIPPED = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]


def smallest(family: str) -> list[str]:
    """A model of the family on digits, tuned by LoRA, whose frozen product autograd keeps a view of the weight for."""
    backbone = {"name": family, **Plugin("backbones").find(family).smallest}
    if family == "vit":
        backbone |= {"channels": 3, "weights": None}  # not the demo's
    images = ["data.image_size=32", "data.channels=3", "data.batch_size=8", "train.device=cpu"]
    return [f"backbone={json.dumps(backbone)}", *images, *METHODS["lora"]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, then two: what every engine did in four steps, and its checkpoint after two."""
    folder = tmp_path_factory.mktemp("engines")
    one = [Case(f"one-{m}", [*SMALL, *said, "data.micro_batch_size=4"], save=2) for m, said in METHODS.items()]
    one += [Case(f"one-{f}", [*smallest(f), "data.micro_batch_size=4"]) for f in Plugin("backbones").names()]
    one.append(Case("one-sgd", [*SMALL, *METHODS["snell"], *SGD]))
    follow(folder, one, STEPS)
    two = [Case(f"{e}-{m}-held", [*WIDE, *ENGINES[e], f"method.name={m}"], held=True) for e, m in HELD]
    two += [Case(f"{e}-{m}-{r}", [*SMALL, *ENGINES[e], *METHODS[m], f"remat.policy={r}"], save=2) for e, m, r in SAMPLE]
    two += [Case(f"{e}-{f}", [*smallest(f), *ENGINES[e]]) for e, f in FAMILIES]
    two += [Case(f"{e}-sgd", [*SMALL, *ENGINES[e], *METHODS["snell"], *SGD]) for e in CLIPPED]
    follow(folder, two, STEPS, processes=2)
    return folder


@pytest.mark.parametrize(("engine", "method", "remat"), SAMPLE)
def test_the_same_bits_as_one_process_that_accumulates(engine: str, method: str, remat: str, out: Path) -> None:
    same_bits(out, f"{engine}-{method}-{remat}", f"one-{method}")


@pytest.mark.parametrize(("engine", "family"), FAMILIES)
def test_the_same_bits_in_every_family(engine: str, family: str, out: Path) -> None:
    same_bits(out, f"{engine}-{family}", f"one-{family}")


def same_bits(out: Path, name: str, alone: str) -> None:
    found, one = trace(out, name), trace(out, alone)
    assert found.refused is None
    assert found.without_gradient == []
    assert found.frozen_moved is False
    assert found.losses == one.losses
    mine, theirs = weights(out, found.name), weights(out, one.name)
    assert mine.keys() == theirs.keys()
    assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert found.norms == pytest.approx(one.norms, rel=1e-6)


@pytest.mark.parametrize("engine", CLIPPED)
def test_clipped_and_accumulated_the_same_but_for_rounding(engine: str, out: Path) -> None:
    """Norms and micro-batches are summed in another order; SGD with momentum, which does not amplify."""
    found, one = trace(out, f"{engine}-sgd"), trace(out, "one-sgd")
    assert found.losses is not None and one.losses is not None
    assert max(map(difference, found.losses, one.losses)) < 1e-6
    mine, theirs = weights(out, found.name), weights(out, one.name)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("engine", "method"), HELD)
def test_nothing_gathered_or_merged_is_kept_between_forward_and_backward(engine: str, method: str, out: Path) -> None:
    """Without recomputation. One kept matrix is 1/12 of a block at least; activations of both blocks are 0.09."""
    found = trace(out, f"{engine}-{method}-held")
    assert found.held_bytes is not None
    assert found.held_bytes < 0.125 * BLOCK_BYTES


READERS = {"one": ["data.micro_batch_size=4"], **{e: ENGINES[e] for e in ("ddp", "fsdp", "zero1", "zero2", "zero3")}}


@pytest.fixture(scope="module")
def resumed(out: Path) -> Path:
    """Every reader goes on from every writer's checkpoint; FSDP2 on four processes, too."""
    common = [*SMALL, *METHODS["snell"]]
    cases = {
        reader: [Case(f"{writer}-to-{reader}", [*common, *said], resume=str(out / saved(writer))) for writer in READERS]
        for reader, said in READERS.items()
    }
    follow(out, cases["one"], STEPS)
    follow(out, [case for reader in READERS if reader != "one" for case in cases[reader]], STEPS, processes=2)
    hybrid = ["engine.name=fsdp", "engine.replicas=2"]
    four = [Case(f"{w}-to-four", [*common, *hybrid], resume=str(out / saved(w))) for w in READERS]
    follow(out, [*four, Case("four", [*common, *hybrid], save=2)], STEPS, processes=4)
    follow(out, [Case("four-to-one", [*common, *READERS["one"]], resume=str(out / "four"))], STEPS)
    return out


def saved(writer: str) -> str:
    return "one-snell" if writer == "one" else f"{writer}-snell-none"


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", READERS)
def test_every_engine_goes_on_exactly_from_every_other(writer: str, reader: str, resumed: Path) -> None:
    found, whole = trace(resumed, f"{writer}-to-{reader}"), trace(resumed, saved(writer))
    assert found.refused is None
    assert whole.losses is not None
    assert found.losses == whole.losses[2:]
    mine, theirs = weights(resumed, found.name), weights(resumed, whole.name)
    assert not [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.mark.parametrize("pair", [*(f"{w}-to-four" for w in READERS), "four-to-one"])
def test_on_another_number_of_processes_the_next_losses_agree(pair: str, resumed: Path) -> None:
    found, whole = trace(resumed, pair), trace(resumed, "one-snell")
    assert found.losses is not None and whole.losses is not None
    assert difference(found.losses[0], whole.losses[2]) < 1e-6


def test_a_process_trains_one_run_after_another(tmp_path: Path) -> None:
    """Without a launcher, as `snell reproduce` does; each run has a process group of its own."""
    runs = [train(tmp_path, "method.rank=4", "engine.name=zero", f"engine.stage={stage}") for stage in (3, 2, 3)]
    first, _, third = (trained(run.folder) for run in runs)
    assert all(torch.equal(first[name], third[name]) for name in first)
