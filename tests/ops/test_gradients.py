"""Gradients against finite differences, and layers of every shape against one another."""

from typing import Any

import pytest
import torch
from layers import close, layer, run
from torch import Tensor

from snell_dist.ops import KERNELS, merge_delta, snell_linear


@pytest.mark.parametrize("sparsify", ["released", "paper", "hard"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("sparsity", [0.0, 0.6])
def test_gradcheck(kernel: str, sparsify: str, sparsity: float) -> None:
    """In float64 against finite differences: where the factor is no function of the factors, of y itself."""
    x, weight, bias, a, b, _ = layer(7, 6, (3,), 4, dtype=torch.float64)
    a, b = (3 * a).detach().requires_grad_(), (3 * b).detach().requires_grad_()
    if sparsify != "hard" and (sparsity or kernel == "snella"):
        # f is a constant to the gradient: hold it by differentiating K f with f from the unmoved factors.
        how = {"sparsity": sparsity, "kernel": kernel, "sparsify": sparsify}
        k = merge_delta(a, b, sparsity=sparsity, kernel=kernel, sparsify="hard", impl="reference")
        with torch.no_grad():
            f = torch.where(k == 0, 0, merge_delta(a, b, **how) / k)
        g = torch.randn(3, 6, dtype=torch.float64)
        want = torch.autograd.grad((x @ (weight + k * f).t() + bias), (x, a, b), g)
        got = torch.autograd.grad(snell_linear(x, weight, bias, a, b, impl="fused", **how), (x, a, b), g)
        close(list(got), list(want), 1e-9)
        return

    def function(*inputs: Tensor) -> Tensor:
        one, two, three = inputs
        return snell_linear(
            one, weight, bias, two, three, sparsity=sparsity, kernel=kernel, sparsify=sparsify, impl="fused"
        )

    assert torch.autograd.gradcheck(function, (x, a, b))


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k not in ("distance", "linear")])
def test_gradcheck_of_trained_scalars(kernel: str) -> None:
    x, weight, bias, a, b, _ = layer(5, 6, (3,), 4, groups=2, dtype=torch.float64)
    scalars = {n: torch.rand(2, dtype=torch.float64) + 0.5 for n in ("alpha", "beta", "gamma")}

    def function(*values: Tensor) -> Tensor:
        params = dict(zip(scalars, values, strict=True))
        return snell_linear(
            x, weight, bias, a, b, sparsity=0.4, kernel=kernel, sparsify="hard", groups=2, kernel_params=params
        )

    assert torch.autograd.gradcheck(function, tuple(v.requires_grad_() for v in scalars.values()))


def test_weight_and_bias_train_if_asked() -> None:
    x, weight, bias, a, b, g = layer()
    weight.requires_grad_()
    bias.requires_grad_()
    grads = [
        torch.autograd.grad(snell_linear(x, weight, bias, a, b, sparsity=0.5, impl=impl), (weight, bias), g)
        for impl in ("fused", "reference")
    ]
    close(list(grads[0]), list(grads[1]))


def test_input_without_gradient_and_one_token() -> None:
    x, weight, bias, a, b, g = layer(tokens=())
    close(
        run((x, weight, bias, a, b, g), sparsity=0.5), run((x, weight, bias, a, b, g), sparsity=0.5, impl="reference")
    )
    y = snell_linear(x.detach(), weight, bias, a, b, sparsity=0.5)
    grads = torch.autograd.grad(y, (a, b), g)
    close(list(grads), run((x, weight, bias, a, b, g), sparsity=0.5)[2:])


def test_no_tokens() -> None:
    x, weight, bias, a, b, g = layer(tokens=(0,))
    y, gx, ga, gb = run((x, weight, bias, a, b, g), sparsity=0.5)
    assert y.shape == (0, 36) and gx.shape == x.shape
    assert not ga.any() and not gb.any()


def test_views_and_odd_strides() -> None:
    x, weight, bias, a, b, g = layer()
    twisted = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    turned = a.detach().t().contiguous().t().requires_grad_()
    how = {"sparsity": 0.5, "dropout": 0.2, "drop_path": 0.2, "training": True}
    torch.manual_seed(0)
    want = run((x, weight, bias, a, b, g), **how)
    torch.manual_seed(0)
    got = run(
        (twisted, weight.t().contiguous().t(), bias, turned, b, g.transpose(0, 1).contiguous().transpose(0, 1)), **how
    )
    close(got, want)


@pytest.mark.parametrize("sparsity", [0.0, 0.6, (0.1, 0.5, 0.9)])
def test_groups_equal_separate_layers(sparsity: Any) -> None:
    x, weight, bias, a, b, g = layer(24, 36, groups=3)
    each = sparsity if isinstance(sparsity, tuple) else (sparsity,) * 3
    together = run((x, weight, bias, a, b, g), sparsity=sparsity, groups=3)
    apart = [
        run((x, weight[r], bias[r], a[:, 8 * i : 8 * i + 8], b[r], g[..., r]), sparsity=s)
        for i, (r, s) in enumerate(zip((slice(0, 12), slice(12, 24), slice(24, 36)), each, strict=True))
    ]
    y, gx, ga, gb = zip(*apart, strict=True)
    close(together, [torch.cat(y, -1), sum(gx[1:], gx[0]), torch.cat(ga, 1), torch.cat(gb)])


def test_one_threshold_for_the_matrix() -> None:
    *_, a, b, _ = layer(24, 36, groups=3)
    delta = merge_delta(a, b, sparsity=0.75, groups=3, sparsity_scope="matrix")
    assert int((delta == 0).sum()) == 0.75 * delta.numel()
    scaled = torch.cat([b[:12] * 30, b[12:]])
    delta = merge_delta(a, scaled, sparsity=0.75, groups=3, sparsity_scope="matrix")
    assert int((delta[:12] == 0).sum()) < int((delta[12:] == 0).sum())


def test_equal_factors_have_gradient_zero() -> None:
    """The subgradient at distance 0, not NaN."""
    a = torch.ones(5, 4, requires_grad=True)
    b = torch.ones(6, 4, requires_grad=True)
    x = torch.randn(3, 5)
    y = snell_linear(x, torch.zeros(6, 5), None, a, b, sparsity=0.0)
    grads = torch.autograd.grad(y.sum(), (a, b))
    assert not y.any() and not grads[0].any() and not grads[1].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_deterministic(kernel: str) -> None:
    parts = layer(300, 500, (2, 7))
    for one, two in zip(run(parts, sparsity=0.9, kernel=kernel), run(parts, sparsity=0.9, kernel=kernel), strict=True):
        assert torch.equal(one, two)
