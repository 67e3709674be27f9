"""One line that says which argument, its value, and what is allowed."""

import re
from typing import Any

import pytest
import torch

from snell_dist.ops import ThresholdState, init_factors, merge_delta, snell_linear

GOOD: dict[str, Any] = {
    "x": torch.zeros(2, 8), "weight": torch.zeros(12, 8), "bias": torch.zeros(12),
    "a": torch.zeros(8, 12), "b": torch.zeros(12, 4), "sparsity": 0.5, "groups": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 9)}, "x must be [..., in] with in = 8; got shape (2, 9)"),
        ({"x": torch.zeros(())}, "x must be [..., in] with in = 8; got shape ()"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "x must be floating point; got torch.int64"),
        ({"weight": torch.zeros(8, 12)}, "weight must be [out, in] = [12, 8] by b and a; got (8, 12)"),
        ({"bias": torch.zeros(8)}, "bias must be [out] = [12]; got shape (8,)"),
        ({"a": torch.zeros(8, 4)}, "a must have groups*rank = 3*4 columns (rank from b); got 4"),
        ({"a": torch.zeros(8)}, "a and b must be 2-D"),
        ({"b": torch.zeros(11, 4)}, "b must have a multiple of groups = 3 rows; got 11"),
        ({"b": torch.zeros(12, 4, dtype=torch.float64)}, "a and b must share device and dtype"),
        (
            {"a": torch.zeros(8, 9), "b": torch.zeros(12, 3)},
            "rank must be a positive multiple of 2 for kernel 'distance'",
        ),
        (
            {"weight": torch.zeros(12, 8, device="meta")},
            "all tensors must be on one device; got x on cpu, weight on meta",
        ),
        ({"sparsity": 1.0}, "sparsity must lie in [0, 1), the fraction of delta that is zero; got 1.0"),
        ({"sparsity": -0.1}, "got -0.1"),
        ({"sparsity": float("nan")}, "got nan"),
        ({"sparsify": "dense"}, "sparsity must be 0 with sparsify='dense', which keeps every entry; got 0.5"),
        ({"sparsity": (0.1, 0.2)}, "sparsity must be one number or 3 for sparsity_scope='group'; got 2"),
        ({"sparsity": "0.5"}, "sparsity must be a number or a sequence of numbers; got '0.5'"),
        ({"groups": 0}, "groups must be a positive integer; got 0"),
        ({"kernel": "distanse"}, "did you mean 'distance'?"),
        ({"sparsify": "release"}, "did you mean 'released'?"),
        ({"impl": "fuzed"}, "did you mean 'fused'?"),
        ({"sparsity_scope": "layer"}, "sparsity_scope must be one of group, matrix; got 'layer'"),
        ({"dropout": 1.0}, "dropout must lie in [0, 1); got 1.0"),
        ({"drop_path": -1.0}, "drop_path must lie in [0, 1); got -1.0"),
        ({"workspace_bytes": 0}, "workspace_bytes must be a positive number of bytes or None; got 0"),
        (
            {"kernel_params": {"alpha": 1.0}},
            "kernel_params of kernel 'distance': name must be one of none; got 'alpha'",
        ),
        ({"kernel": "snella", "kernel_params": {"alfa": 1.0}}, "did you mean 'alpha'?"),
        ({"kernel": "snella", "kernel_params": {"alpha": torch.ones(2)}}, "must have 1 or 3 elements (groups)"),
    ],
)
def test_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        snell_linear(**{**GOOD, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_merging_refuses_factors_that_are_not_finite(name: str, impl: str) -> None:
    factors = dict(zip("ab", init_factors(8, 12, 4), strict=True))
    factors[name][1, 1] = torch.inf
    with pytest.raises(ValueError, match=rf"{name} has 1 of \d+ entries that are not finite"):
        merge_delta(**factors, sparsity=0.5, impl=impl)


def test_initialisation() -> None:
    a, b = init_factors(100, 300, 8, 3, generator=torch.Generator().manual_seed(0))
    assert a.shape == (100, 24) and b.shape == (300, 8)
    for factor in (a, b):  # 1 / sqrt(features * rank / 2), features = 100 in both
        assert 0.98 * 0.05 < factor.abs().max() <= 0.05
    assert torch.equal(a, init_factors(100, 300, 8, 3, generator=torch.Generator().manual_seed(0))[0])
    with pytest.raises(ValueError, match="rank must be a positive multiple of 2"):
        init_factors(8, 8, 3)
    with pytest.raises(ValueError, match="out_features must be a multiple of groups; got 8 and 3"):
        init_factors(8, 8, 4, 3)


def test_refresh_every() -> None:
    with pytest.raises(ValueError, match="refresh_every must be a positive number of steps; got 0"):
        ThresholdState(0)
