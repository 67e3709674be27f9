"""The exact threshold: three ways to one number, against the library's quantile and numpy's partition."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from snell_dist.ops import fused, init_factors, merge_delta, snell_linear
from snell_dist.ops.snell import make_plan
from snell_dist.ops.threshold import by_bracket, by_partition, by_radix, by_sorting, position
from snell_dist.ops.tiles import Matrix

NEVER = 0.0, 0.0


def all_ways(m: Tensor, s: float, interpolated: bool = True, parts: int = 3) -> dict[str, Tensor]:
    """The threshold of m [out, in] by each selection, over row tiles."""

    def tiles() -> Iterator[Tensor]:
        yield from (t for t in m.tensor_split(parts) if t.numel())

    def masks(tile: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(tile, dtype=torch.bool), torch.empty_like(tile, dtype=torch.bool)

    exact = float(np.quantile(m.double().numpy(), s)) if m.isfinite().all() else 1.0
    brackets = iter([NEVER, (exact * 0.9, exact * 1.1), (0.0, np.inf)])
    found = {
        "sorting": by_sorting(m, s, interpolated),
        "partition": by_partition(tiles, m.numel(), s, interpolated, m),
        "radix": by_radix(tiles, m.numel(), s, interpolated, m),
    }
    bracket = by_bracket(tiles, m.numel(), s, interpolated, brackets, masks)
    return found if bracket is None else {**found, "bracket": bracket[0]}


def agree(found: dict[str, Tensor], want: Tensor) -> None:
    for name, value in found.items():
        assert torch.equal(value, want) or (value.isnan() and want.isnan()), (name, value, want)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 40), cols=st.integers(1, 40),
    s=st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.99, 0.9999]), st.floats(0, 0.999999)),
    levels=st.sampled_from([1, 2, 5, 1000, 10**9]), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_equal_to_the_library_bit_for_bit(
    seed: int, rows: int, cols: int, s: float, levels: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    m = torch.randint(0, levels, (rows, cols), generator=generator).to(dtype) / levels  # few levels: many ties
    agree(all_ways(m, s), torch.quantile(m.flatten(), s))


@pytest.mark.parametrize("s", [0.001, 0.07, 0.5, 0.99])
def test_the_papers_order_statistic(s: float) -> None:
    m = torch.rand(10, 10)
    rank = max(int(np.ceil(round(s * 100, 9))), 1)
    agree(all_ways(m, s, interpolated=False), m.flatten().sort().values[rank - 1])


@pytest.mark.parametrize("value", [0.0, 0.3, 1e-42])
def test_all_equal(value: float) -> None:
    m = torch.full((20, 30), value)
    agree(all_ways(m, 0.7), torch.tensor(value))


def test_one_element_infinity_and_nan() -> None:
    agree(all_ways(torch.tensor([[0.25]]), 0.9), torch.tensor(0.25))
    m = torch.rand(9, 9)
    m[3, 3] = torch.inf
    agree(all_ways(m, 0.5), torch.quantile(m.flatten(), 0.5))
    m[4, 4] = torch.nan
    agree(all_ways(m, 0.5), torch.tensor(torch.nan))
    assert by_sorting(torch.empty(0, 3), 0.5, True).isnan()


def test_beyond_the_librarys_limit() -> None:
    """4100 x 4100 is more than torch.quantile took for years; numpy's partition finds the same two neighbours."""
    a, b = init_factors(4100, 4100, 8)
    plan = make_plan(a, b, 0.9, "distance", "released", 1, "group")
    found = fused.thresholds(Matrix(a, b, None, plan), None)[0]
    m = merge_delta(a, b, sparsity=0.0).abs_().flatten()
    assert m.numel() > 1 << 24
    place = float(np.float32(0.9)) * (m.numel() - 1)
    low = int(place)
    ordered = np.partition(m.numpy(), [low, low + 1])
    want = np.float32(ordered[low]) + np.float32(place - low) * (ordered[low + 1] - ordered[low])
    assert ordered[low] <= found.item() <= ordered[low + 1]
    assert found.item() == pytest.approx(float(want), rel=1e-7)


def test_positions() -> None:
    assert position(0.5, 3, True, torch.float32) == (1, 1, 0.0)
    assert position(0.0, 1, True, torch.float32) == (0, 0, 0.0)
    assert position(0.07, 100, False, torch.float32)[0] == 6
    assert position(0.5, 2**26 + 2, True, torch.float32) == (2**25, 2**25 + 1, 0.5)  # float32 has no such number


@pytest.mark.parametrize("kernel", ["distance", "snella"])
@pytest.mark.parametrize("workspace", [None, 20_000])
def test_nan_in_a_factor_is_never_hidden(kernel: str, workspace: int | None) -> None:
    a, b = init_factors(40, 60, 8)
    x, weight = torch.randn(5, 40), torch.randn(60, 40)
    for factor in (a, b):
        kept = factor[3, 2].item()
        for bad in (torch.nan, torch.inf):
            factor[3, 2] = bad
            for impl in ("fused", "reference"):
                y = snell_linear(
                    x, weight, None, a, b, sparsity=0.5, kernel=kernel, impl=impl, workspace_bytes=workspace
                )
                # A column of the factor a reaches every output, a row of b its own.
                assert y.isnan().any(1).all()
        factor[3, 2] = kept


def test_ties_at_zero() -> None:
    """A factor of zeros: every |K| is equal, nothing is above the threshold, the weight is untouched."""
    a, b = torch.zeros(20, 4), torch.zeros(30, 4)
    x, weight = torch.randn(5, 20), torch.randn(30, 20)
    y = snell_linear(x, weight, None, a, b, sparsity=0.5, kernel="linear")
    torch.testing.assert_close(y, x @ weight.t())


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1)])
def test_thin_layers(shape: tuple[int, int]) -> None:
    inputs, out = shape
    a, b = init_factors(inputs, out, 2)
    x, weight = torch.randn(3, inputs), torch.randn(out, inputs)
    want = snell_linear(x, weight, None, a, b, sparsity=0.5, impl="reference")
    torch.testing.assert_close(snell_linear(x, weight, None, a, b, sparsity=0.5), want)


def test_empty_layers() -> None:
    for inputs, out in ((0, 5), (5, 0)):
        a, b = torch.zeros(inputs, 4), torch.zeros(out, 4)
        for impl in ("fused", "reference"):
            y = snell_linear(torch.zeros(3, inputs), torch.zeros(out, inputs), None, a, b, sparsity=0.5, impl=impl)
            assert y.shape == (3, out) and not y.any()
