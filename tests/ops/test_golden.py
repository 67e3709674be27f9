"""Agreement with the paper's released code: outputs and gradients of single operators."""

import golden
import pytest
import torch

from snell_dist.ops import merge_delta, snell_linear

IMPLS = ["reference", "auto"]
SCALARS = ("alpha", "gamma", "beta")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", golden.OPERATORS)
def test_operator(name: str, impl: str) -> None:
    data, how = golden.operator(name)
    leaves = {k: data[k].clone().requires_grad_() for k in ("x", "A", "B", *SCALARS) if k in data}
    params = {k: leaves[k] for k in SCALARS if k in leaves}
    weight = torch.zeros(data["y"].shape[1], data["x"].shape[1])
    y = snell_linear(leaves["x"], weight, None, leaves["A"], leaves["B"], impl=impl, kernel_params=params, **how)
    y.backward(data["g"])
    assert golden.error(y, data["y"]) < 1e-6
    for key, leaf in leaves.items():
        assert leaf.grad is not None
        # A scalar's gradient is one sum over the matrix: its float32 terms cancel in the golden number too.
        assert golden.error(leaf.grad, data[f"g{key}"]) < (1e-5 if key in SCALARS else 1e-6), key


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", golden.OPERATORS)
def test_delta(name: str, impl: str) -> None:
    data, how = golden.operator(name)
    params = {k: data[k] for k in SCALARS if k in data}
    delta = merge_delta(data["A"], data["B"], impl=impl, kernel_params=params, **how)
    assert golden.error(delta, data["delta"]) < 1e-6
    assert int((delta != 0).sum()) == golden.CASES[name]["nonzero"]
