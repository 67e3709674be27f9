"""Half precision, autocast, and low-precision products."""

from typing import Any

import golden
import torch
from layers import close, layer, run
from torch import Tensor, nn

from snell_dist.ops import merge_delta, snell_linear
from snell_dist.ops.plan import Plan
from snell_dist.ops.tiles import Matrix


def test_bfloat16_weight_with_float32_factors() -> None:
    x, weight, bias, a, b, g = layer(64, 64, (4, 8))
    low = nn.Parameter(weight.detach().bfloat16(), False)
    exact = run((x, low.float(), bias, a, b, g), sparsity=0.5)
    close(run((x, low, bias, a, b, g), sparsity=0.5), exact)
    half = run((x.detach().bfloat16().requires_grad_(), low, bias.bfloat16(), a, b, g), sparsity=0.5)
    assert [t.dtype for t in half] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    close([t.float() for t in half], exact, 2e-2)


def test_half_precision_does_not_round_the_delta_away() -> None:
    """At the start |delta| is far below half a unit in the last place of a bfloat16 weight."""
    x, weight, _, a, b, _ = layer(256, 256, (2, 64))
    x, weight = x.detach().bfloat16(), nn.Parameter(weight.detach().bfloat16(), False)
    delta = merge_delta(a, b, sparsity=0.5).detach()
    assert golden.error((weight + delta).bfloat16().float() - weight, delta) > 0.5  # what merging would leave of it
    nothing = torch.zeros(256, 256, dtype=torch.bfloat16)
    y = snell_linear(x, nn.Parameter(nothing, False), None, a, b, sparsity=0.5)
    assert golden.error(y, x.float() @ delta.t()) < 1e-2


def test_a_matrix_of_several_blocks_in_half_precision() -> None:
    x, weight, bias, a, b, g = layer(384, 576, (4, 8))
    assert len(Matrix(a, b, None, Plan("distance", "released", 1, "group", (0.9,))).blocks()) > 1
    exact = run((x, weight, bias, a, b, g), sparsity=0.9)
    half = run((x.detach().bfloat16().requires_grad_(), weight, bias, a, b, g), sparsity=0.9)
    close([t.float() for t in half], exact, 2e-2)


def test_autocast_and_half_factors() -> None:
    x, weight, bias, a, b, g = layer()
    with torch.autocast("cpu", torch.bfloat16):
        got = run((x, weight, bias, a, b, g), sparsity=0.5)
        assert got[0].dtype == torch.bfloat16 and got[1].dtype == got[2].dtype == torch.float32
    close([t.float() for t in got], run((x, weight, bias, a, b, g), sparsity=0.5), 2e-2)
    low = run((x, weight, bias, *(t.detach().bfloat16().requires_grad_() for t in (a, b)), g), sparsity=0.5)
    assert [t.dtype for t in low] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


def test_low_product_precision_does_not_reach_the_distances() -> None:
    parts = layer(64, 96)
    want = run(parts, sparsity=0.5)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(merge_delta(parts[3].detach(), parts[4].detach(), sparsity=0.5), merged_exactly(parts))
        got = run(parts, sparsity=0.5)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    close(got, want, 3e-2)


def merged_exactly(parts: Any) -> Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    delta = merge_delta(parts[3].detach(), parts[4].detach(), sparsity=0.5)
    torch.set_float32_matmul_precision(before)
    return delta
