"""Both implementations against a formula written a second time, on random shapes, in float64."""

from typing import Any

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snell_dist.ops import KERNELS, init_factors, merge_delta, snell_linear
from snell_dist.ops.kernels import find

SCALARS = {"alpha": 0.7, "beta": 0.9, "gamma": 1.3}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    sparsify = draw(st.sampled_from(["released", "paper", "hard", "dense"]))
    return {
        "kernel": draw(st.sampled_from(KERNELS)),
        "sparsify": sparsify,
        "groups": draw(st.sampled_from([1, 2, 3])),
        "scope": draw(st.sampled_from(["group", "matrix"])),
        "s": 0.0 if sparsify == "dense" else draw(st.sampled_from([0.0, 0.1, 0.5, 0.77, 0.99])),
        "rank": 2 * draw(st.integers(1, 5)),
        "rows": draw(st.integers(1, 40)),
        "cols": draw(st.integers(1, 40)),
        "weight": draw(st.booleans()),
        "tokens": draw(st.integers(1, 9)),
        "workspace": draw(st.sampled_from([None, 1, 3000, 40000])),
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.parametrize("impl", ["reference", "fused"])
@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_random_layers(impl: str, case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(case["seed"])
    out, dtype = case["rows"] * case["groups"], torch.float64
    a, b = init_factors(case["cols"], out, case["rank"], case["groups"], generator=generator, dtype=dtype)
    x, w, bias, g = (
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in ((case["tokens"], case["cols"]), (out, case["cols"]), (out,), (case["tokens"], out))
    )
    if not case["weight"]:  # the delta's part alone
        w, bias = torch.zeros_like(w), torch.zeros_like(bias)
    names = find(case["kernel"]).PARAMS
    how = {
        "sparsity": case["s"], "kernel": case["kernel"], "sparsify": case["sparsify"], "groups": case["groups"],
        "sparsity_scope": case["scope"], "impl": impl, "kernel_params": {n: SCALARS[n] for n in names},
    }  # fmt: skip
    leaves = [t.requires_grad_() for t in (x, a, b)]
    frozen = (w, bias) if case["weight"] else (None, None)
    y = snell_linear(x, *frozen, a, b, workspace_bytes=case["workspace"], **how)
    y.backward(g)
    arrays = [t.detach().numpy() for t in (x, w, bias, a, b, g)]
    want = naive.layer(
        *arrays, s=case["s"], name=case["kernel"], sparsify=case["sparsify"], groups=case["groups"],
        scope=case["scope"], p=SCALARS,
    )  # fmt: skip
    with torch.no_grad():
        found = {"y": y.detach(), "delta": merge_delta(a, b, **how)}
    found |= {name: leaf.grad for name, leaf in zip(("x", "a", "b"), leaves, strict=True)}
    allowed = 1e-12 + 1e-14 * product_form(arrays[3], arrays[4], case["groups"])
    for name, value in found.items():
        norm = np.linalg.norm(want[name])
        assert np.linalg.norm(value.numpy() - want[name]) <= allowed * norm + 1e-14, (name, allowed)


def product_form(a: naive.Array, b: naive.Array, groups: int) -> float:
    """How much worse than its terms |b|^2 - 2 ab + |a|^2 can be: their size over the smallest squared distance."""
    worst, half = 1.0, b.shape[1] // 2
    for one, two in zip(np.split(a, groups, 1), np.split(b, groups), strict=True):
        for part in (slice(0, half), slice(half, None)):
            left, right = two[:, None, part], one[None, :, part]
            size = (left**2).sum(-1) + (right**2).sum(-1)
            worst = max(worst, float((size / ((left - right) ** 2).sum(-1)).max()))
    return worst
