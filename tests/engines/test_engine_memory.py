"""What engines say of a job's memory where no process can be asked: GPUs, many nodes, offloaded states."""

from __future__ import annotations

import pytest

from snell_dist.config import Plugin
from snell_dist.engines import EngineSection, Job, Share
from snell_dist.footprint import HELD, Category, Footprint, Moment, Owner, Phase, Weight

BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
WIDTH, RANK = 768, 8
ACTIVATIONS = 9_000_000  # of a block


def weights() -> list[Weight]:
    found = [weight("embed", "", WIDTH, 48, trains=False)]
    for block in BLOCKS:
        found += [
            weight(f"{block}.linear.weight", block, WIDTH, WIDTH, trains=False),
            weight(f"{block}.linear.a", block, WIDTH, RANK, trains=True),
            weight(f"{block}.linear.b", block, WIDTH, RANK, trains=True),
        ]
    return [*found, weight("head.weight", "", 10, WIDTH, trains=True), weight("head.bias", "", 10, trains=True)]


def weight(name: str, block: str, *shape: int, trains: bool) -> Weight:
    numbers = 1
    for size in shape:
        numbers *= size
    return Weight(name, block, shape, 4 * numbers, trains)


FROZEN = sum(w.bytes for w in weights() if not w.trains)
TRAINS = sum(w.bytes for w in weights() if w.trains)
COUNTS = 4 * sum(w.trains for w in weights())
HELD_WHOLE = {Category.FROZEN: FROZEN, Category.TRAINABLE: TRAINS, Category.OPTIMIZER: 2 * TRAINS + COUNTS}


def whole() -> Footprint:
    """One process: activations grow block by block and go again; each block's gradients come in its backward."""
    trained = {b: sum(w.bytes for w in weights() if w.trains and w.block == b) for b in ["", *BLOCKS]}
    moments, gradients = [], trained[""]
    for i, block in enumerate(BLOCKS):
        moments.append(moment(Phase.FORWARD, block, (i + 1) * ACTIVATIONS, 0))
    moments += [
        moment(Phase.FORWARD, "head", 3 * ACTIVATIONS, 0),
        moment(Phase.BACKWARD, "head", 3 * ACTIVATIONS, gradients),
    ]
    for i, block in reversed(list(enumerate(BLOCKS))):
        gradients += trained[block]
        moments.append(moment(Phase.BACKWARD, block, (i + 1) * ACTIVATIONS, gradients, trained[block]))
    moments.append(Moment(Phase.STEP, "", "", HELD_WHOLE | {Category.GRADIENTS: TRAINS, Category.TEMPORARY: TRAINS}))
    owners = [Owner(f"{block}.linear", block, Category.FROZEN, FROZEN // 3) for block in BLOCKS]
    return Footprint(moments, HELD_WHOLE, owners)


def moment(phase: Phase, block: str, activations: int, gradients: int, own: int = 0) -> Moment:
    here = {Category.ACTIVATIONS: activations, Category.TEMPORARY: 2_000_000, Category.GRADIENTS: gradients}
    before = activations - (ACTIVATIONS if phase == Phase.FORWARD else 0)
    start = HELD_WHOLE | {Category.ACTIVATIONS: before, Category.GRADIENTS: gradients - own}
    return Moment(phase, block, "", HELD_WHOLE | here, start)


def engine(name: str, **said: object) -> EngineSection:
    return Plugin("engines").find(name)(name=name, **said)  # type: ignore[call-arg]


def share(name: str, ranks: int, per_node: int = 8, device: str = "cuda", twice: bool = False, **said: object) -> Share:
    return engine(name, **said).share(whole(), Job(weights(), BLOCKS, ranks, per_node, 1 + twice, device))


def held(share: Share) -> int:
    return sum(share.footprint.held.get(category, 0) for category in HELD)


ALL = [
    ("ddp", {}),
    *(("fsdp", {"frozen": frozen}) for frozen in ("shard", "replicate", "offload")),
    ("fsdp", {"reshard": False}),
    ("fsdp", {"replicas": 2}),
    *(("zero", {"stage": stage}) for stage in range(4)),
    ("zero", {"stage": 2, "offload_optimizer": True}),
    ("zero", {"stage": 3, "offload_optimizer": True, "frozen": "offload"}),
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("name", "said"), ALL)
def test_a_share_says_the_same_everywhere(name: str, said: dict, device: str) -> None:
    found = share(name, 8, device=device, **said)
    footprint = found.footprint
    assert all(size > 0 for m in footprint.moments for size in m.bytes.values())
    assert footprint.peak_bytes >= max(footprint.held.get(c, 0) for c in Category)
    for category in HELD:
        if category in footprint.held:
            assert {m.bytes.get(category, 0) for m in footprint.moments} == {footprint.held[category]}
    assert (found.host_bytes > 0) == (device == "cuda" and "offload" in str(said))
    assert found.between_nodes_bytes == 0
    assert found.messages > 0


@pytest.mark.parametrize(("name", "said"), ALL)
def test_activations_stay_as_they_are_where_they_are_highest(name: str, said: dict) -> None:
    found = share(name, 8, **said).footprint
    assert found.peak.bytes.get(Category.ACTIVATIONS, 0) == 3 * ACTIVATIONS


def test_ddp_on_one_rank_is_the_process_itself() -> None:
    assert share("ddp", 1) == Share(whole(), 0, 0, 0, 0)


def test_fsdp_pads_thin_factors_to_whole_rows() -> None:
    """On 1024 ranks a factor [768, 8] is a row of 8 on a rank that has one, the head [10, 768] a row of 768."""
    row = 3 * (WIDTH + 2 * RANK) + 48 + (WIDTH + 1)
    trained = 3 * 2 * RANK + (WIDTH + 1)
    assert held(share("fsdp", 1024)) == 4 * (row + 2 * trained) + COUNTS


@pytest.mark.parametrize(("ranks", "part"), [(8, 8), (1024, 1024)])
def test_zero_3_divides_numbers_and_not_rows(ranks: int, part: int) -> None:
    parts = sum(-(-w.numbers // part) for w in weights())
    trained = sum(-(-w.numbers // part) for w in weights() if w.trains)
    assert held(share("zero", ranks, stage=3)) == 4 * (parts + 3 * trained) + COUNTS


def test_offload_leaves_the_device_what_is_gathered() -> None:
    there, away = share("fsdp", 8), share("fsdp", 8, frozen="offload")
    kept = sum(there.footprint.held.values())
    assert held(away) == 0
    assert away.host_bytes == pytest.approx(kept + TRAINS / 8, rel=0.01)
    (one,) = (m for m in away.footprint.moments if (m.phase, m.block) == (Phase.BACKWARD, "blocks.1"))
    assert one.bytes[Category.GATHERED] > 0
    assert away.footprint.peak_bytes == pytest.approx(there.footprint.peak_bytes - kept, rel=0.01)


def test_what_stays_gathered_without_resharding() -> None:
    def gathered(reshard: bool) -> list[int]:
        found = share("fsdp", 8, reshard=reshard).footprint
        return [m.bytes.get(Category.GATHERED, 0) for m in found.moments if m.phase == Phase.FORWARD]

    kept, freed = gathered(reshard=False), gathered(reshard=True)
    assert freed[1] == freed[2]
    assert kept[0] < kept[1] < kept[2]


def test_the_network_between_nodes() -> None:
    """Shards inside a node leave to the network the all-reduce of a rank's part of the gradient."""
    flat, hybrid = share("fsdp", 32), share("fsdp", 32, replicas=4)
    assert flat.between_nodes_bytes == flat.wire_bytes
    part = 4 * (3 * 2 * WIDTH * RANK // 8 + 2 * (WIDTH + 1))  # two of the head's ten rows, of eight ranks
    assert hybrid.between_nodes_bytes == pytest.approx(2 * 3 / 4 * part, rel=0.001)
    assert hybrid.between_nodes_bytes < hybrid.wire_bytes
    assert share("fsdp", 32, replicas=2).between_nodes_bytes == share("fsdp", 32, replicas=2).wire_bytes
    assert share("ddp", 32).between_nodes_bytes == share("ddp", 32).wire_bytes
    assert share("ddp", 32, per_node=32).between_nodes_bytes == 0


def test_each_micro_batch_gathers_and_the_last_one_reduces() -> None:
    once, twice = share("fsdp", 8), share("fsdp", 8, twice=True)
    reduced = TRAINS * 7 / 8
    assert twice.wire_bytes - once.wire_bytes == pytest.approx(once.wire_bytes - reduced, rel=0.02)
    assert share("ddp", 8, twice=True).wire_bytes == share("ddp", 8).wire_bytes


def test_owners_are_those_of_this_peak() -> None:
    found = share("fsdp", 8).footprint
    frozen = [owner.bytes for owner in found.owners if owner.category == Category.FROZEN]
    assert frozen == [pytest.approx(FROZEN / 8 / 3, rel=0.01)] * 3
    (gathered,) = (owner.bytes for owner in found.owners if owner.category == Category.GATHERED)
    assert gathered == found.peak.bytes[Category.GATHERED]
    assert [o.bytes for o in found.owners] == sorted((o.bytes for o in found.owners), reverse=True)


def test_what_deepspeeds_own_keys_change() -> None:
    keys = {"zero_optimization": {"reduce_bucket_size": 5_000_000}}
    small, large = share("zero", 8, stage=2), share("zero", 8, stage=2, deepspeed_extra=keys)
    backward = [m for m in large.footprint.moments if m.phase == Phase.BACKWARD]
    assert all(m.bytes[Category.COMMUNICATION] >= 20_000_000 for m in backward)
    assert large.footprint.peak_bytes - small.footprint.peak_bytes == 20_000_000 - 4 * 2**20
