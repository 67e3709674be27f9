"""A small adapted layer, a run of it, and a count of the bytes that a function needs."""

from typing import Any

import golden
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from snell_dist.ops import init_factors, snell_linear


def layer(
    inputs: int = 24, out: int = 36, tokens: tuple[int, ...] = (4, 5), rank: int = 8, groups: int = 1,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, nn.Parameter, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, frozen weight, bias, a, b, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    a, b = init_factors(inputs, out, rank, groups, generator=generator, dtype=dtype)
    x = torch.randn(*tokens, inputs, generator=generator, dtype=dtype).requires_grad_()
    weight = nn.Parameter(torch.randn(out, inputs, generator=generator, dtype=dtype) / inputs**0.5, False)
    bias = torch.randn(out, generator=generator, dtype=dtype)
    g = torch.randn(*tokens, out, generator=generator, dtype=dtype)
    return x, weight, bias, a.requires_grad_(), b.requires_grad_(), g


def run(parts: Any, **how: Any) -> list[Tensor]:
    """y and the gradients of x, a, b."""
    x, weight, bias, a, b, g = parts
    y = snell_linear(x, weight, bias, a, b, **how)
    return [y.detach(), *torch.autograd.grad(y, (x, a, b), g.to(y.dtype))]


def close(got: list[Tensor], want: list[Tensor], tolerance: float = 2e-6) -> None:
    for one, two in zip(got, want, strict=True):
        assert one.shape == two.shape
        assert golden.error(one, two) < tolerance


def peak_bytes(function: Any) -> tuple[Any, int]:
    """The function's result and the most bytes that were allocated at once within it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    now = top = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return result, top
