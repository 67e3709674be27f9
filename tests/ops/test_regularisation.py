"""Dropout and drop path: given the mask, exactly the formula; without it, fair."""

from typing import Any

import naive
import numpy as np
import pytest
import torch
from layers import close, layer, run

from snell_dist.ops import drop_paths, snell_linear
from snell_dist.ops.regularize import _hashed_scale, draw_path, draw_seed, keep_scale


def test_dropped_regularisation_against_the_formula() -> None:
    """Given the mask and the fate of each sample, y and every gradient are those of the formula."""
    parts = layer(24, 36, (6, 5), groups=3, dtype=torch.float64)
    x, weight, bias, a, b, g = parts
    for dropout, drop_path in ((0.3, 0.0), (0.0, 0.4), (0.3, 0.4)):
        how = {"sparsity": 0.5, "groups": 3, "dropout": dropout, "drop_path": drop_path, "training": True}
        torch.manual_seed(5)
        mask, fate = torch.ones(x.shape, dtype=x.dtype), torch.ones(6)
        if dropout:
            mask = keep_scale(draw_seed(x.device), x.shape, dropout, x.dtype)
        if drop_path:
            fate = draw_path(6, drop_path, x)
            assert 0 in fate and fate.max() > 1
        scale = (mask * fate.double()[:, None, None]).flatten(0, 1).numpy()
        want = naive.layer(
            *[t.detach().reshape(-1, t.shape[-1]).numpy() for t in (x, weight)], bias.numpy(),
            *[t.detach().numpy() for t in (a, b)], g.flatten(0, 1).numpy(),
            s=0.5, name="distance", sparsify="released", groups=3, scope="group", p={}, scale=scale,
        )  # fmt: skip
        for impl in ("fused", "reference"):
            torch.manual_seed(5)
            for got, key in zip(run(parts, **how, impl=impl), ("y", "x", "a", "b"), strict=True):
                np.testing.assert_allclose(got.numpy().reshape(want[key].shape), want[key], rtol=1e-7, atol=1e-10)


def test_drop_path_of_long_samples_merges() -> None:
    """Runs of samples get products of their own; the result is that of two products."""
    parts = layer(24, 36, (8, 100))
    for seed in range(6):
        results = []
        for impl in ("fused", "reference"):
            torch.manual_seed(seed)
            results.append(run(parts, sparsity=0.5, drop_path=0.5, training=True, impl=impl))
        close(*results)


def test_regularisation_rests_outside_training() -> None:
    parts = layer()
    want = run(parts, sparsity=0.5)
    for one, two in zip(run(parts, sparsity=0.5, dropout=0.5, drop_path=0.5, training=False), want, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("make", [keep_scale, _hashed_scale])
def test_the_mask_is_fair_and_repeatable(make: Any) -> None:
    seed = torch.tensor(1234567890123)
    shape = torch.Size((400, 500))
    mask = make(seed, shape, 0.1, torch.float32)
    assert torch.equal(mask, make(seed, shape, 0.1, torch.float32))
    assert not torch.equal(mask, make(seed + 1, shape, 0.1, torch.float32))
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    kept = (mask != 0).double()
    sigma = 0.3 / shape.numel() ** 0.5
    assert abs(kept.mean() - 0.9) < 5 * sigma
    for shift in (1, 500):  # neighbours in both axes are independent
        both = (kept.flatten()[shift:] * kept.flatten()[:-shift]).mean()
        assert abs(both - 0.81) < 10 * sigma


def test_checkpointed_forward_repeats_the_mask() -> None:
    parts = layer()
    x, weight, bias, a, b, g = parts
    how: dict[str, Any] = {"sparsity": 0.5, "dropout": 0.3, "drop_path": 0.3, "training": True}
    torch.manual_seed(3)
    want = run(parts, **how)
    torch.manual_seed(3)
    y = torch.utils.checkpoint.checkpoint(
        lambda x, a, b: snell_linear(x, weight, bias, a, b, **how), x, a, b, use_reentrant=False
    )
    for one, two in zip([y.detach(), *torch.autograd.grad(y, (x, a, b), g)], want, strict=True):
        assert torch.equal(one, two)


def test_row_groups_have_fates_of_their_own() -> None:
    """As three layers that each draw: every pair of fates occurs, whole outputs are dropped, the mean stays."""
    y = torch.ones(4000, 2, 3 * 5, dtype=torch.float64)
    kept = drop_paths(y, 3, 0.25).view(4000, 2, 3, 5)
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    fates = kept[:, 0, :, 0] != 0
    assert torch.equal(kept, fates[:, None, :, None].expand_as(kept) / 0.75)
    assert abs(fates.double().mean().item() - 0.75) < 0.02
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs((fates[:, one] & fates[:, other]).double().mean().item() - 0.75**2) < 0.04
    assert drop_paths(torch.ones(6), 3, 0.5).shape == (6,)
