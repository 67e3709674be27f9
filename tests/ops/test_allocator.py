"""The allocator against the released code's run, and on its own."""

import golden
import pytest
import torch

from snell_dist.ops import Allocator
from snell_dist.ops.allocator import share

CASE = golden.CASES["allocator"]
SIZES = {name: i * o for name, (i, o) in CASE["layers"].items()}


def make() -> Allocator:
    return Allocator(
        SIZES, initial=CASE["init_sparsity"], target=CASE["target_sparsity"], epochs=CASE["epochs"],
        init_warmup=CASE["init_warmup"], final_warmup=CASE["final_warmup"], interval=CASE["mask_interval"],
        beta1=CASE["beta1"], beta2=CASE["beta2"],
    )  # fmt: skip


def observe(allocator: Allocator, epoch: int) -> None:
    data = golden.load("allocator")
    for step in range(CASE["steps_per_epoch"]):
        for name in SIZES:
            pairs = [(data[f"{name}.{f}"], data[f"{name}.g{f}.{epoch}.{step}"]) for f in "AB"]
            allocator.observe(name, pairs)


@pytest.mark.parametrize("restart", [None, 5])
def test_golden_run(restart: int | None) -> None:
    allocator = make()
    for epoch in range(CASE["epochs"]):
        if epoch == restart:
            state = allocator.state_dict()
            allocator = make()
            allocator.load_state_dict(state)
        assert allocator.budget(epoch) == CASE["budget_after_each_epoch_start"][epoch]
        assert allocator.allocate(epoch) == CASE["sparsity"][epoch]
        observe(allocator, epoch)


def test_equal_shares_before_any_gradient() -> None:
    allocator = Allocator({"p": 100, "q": 100}, initial=0.0, target=0.5, epochs=4)
    assert allocator.allocate(4) == {"p": 0.5, "q": 0.5}


def test_what_does_not_fit_goes_to_the_others() -> None:
    assert share(150, {"p": 0.9, "q": 0.1}, {"p": 100, "q": 100}) == {"p": 100, "q": 50}
    assert share(500, {"p": 0.9, "q": 0.1}, {"p": 100, "q": 100}) == {"p": 100, "q": 100}
    assert share(50, {"p": 1.0, "q": 0.0}, {"p": 10, "q": 100}) == {"p": 10, "q": 0}


def test_nan_and_missing_gradients_count_as_zero() -> None:
    allocator = Allocator({"p": 4}, initial=0.0, target=0.5, epochs=4)
    p = torch.ones(2, 2)
    allocator.observe("p", [(p, torch.full_like(p, torch.nan)), (p, None)])
    assert allocator.scores() == {"p": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": 1.0}, r"target must lie in \[0, 1\).*got 1.0"),
        ({"beta1": -0.1}, r"beta1 must lie in \[0, 1\)"),
        ({"epochs": 2, "final_warmup": 2}, "epochs must exceed"),
        ({"metric": "size"}, "metric must be one of sensitivity, magnitude; got 'size'"),
        ({"interval": 0}, "interval must be a positive number"),
    ],
)
def test_bad_settings(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Allocator({"p": 4}, **{"initial": 0.0, "target": 0.5, "epochs": 4, **change})


def test_unknown_matrices() -> None:
    allocator = Allocator({"p": 4}, initial=0.0, target=0.5, epochs=4)
    with pytest.raises(ValueError, match="got 'q'"):
        allocator.observe("q", [])
    with pytest.raises(ValueError, match="same matrices"):
        allocator.load_state_dict({"sparsity": {"q": 0.1}, "averages": {}})
