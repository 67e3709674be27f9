"""What the fused operator promises beyond its numbers: gradients, what it keeps, tiles, precision, regularisation."""

from typing import Any

import golden
import naive
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from snell_dist.ops import KERNELS, ThresholdState, init_factors, library, merge_delta, snell_linear
from snell_dist.ops.regularize import _hashed_scale, draw_path, draw_seed, keep_scale
from snell_dist.ops.snell import make_plan


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


def test_keeps_only_inputs_and_thresholds() -> None:
    """The parameter object itself, so that an engine may free it and bring it back; nothing of the matrix's size."""
    x, weight, bias, a, b, g = layer(64, 64, (4, 8))
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = snell_linear(x, weight, bias, a, b, sparsity=0.5)
    own = {t.data_ptr() for t in (x, weight, a, b)}
    assert any(t is weight for t in packed)
    assert all(t.data_ptr() in own or t.numel() == 2 for t in packed)
    want = torch.autograd.grad(y, (x, a, b), g, retain_graph=True)
    values = weight.detach().clone()
    weight.untyped_storage().resize_(0)  # as ZeRO-3 does between forward and backward
    weight.untyped_storage().resize_(values.numel() * 4)
    weight.data.copy_(values)
    for one, two in zip(torch.autograd.grad(y, (x, a, b), g), want, strict=True):
        assert torch.equal(one, two)


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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scope", ["group", "matrix"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_the_workspace_changes_nothing(kernel: str, scope: str, drop: float) -> None:
    parts = layer(40, 90, (4, 64), groups=3)
    how = {"sparsity": 0.7, "kernel": kernel, "groups": 3, "sparsity_scope": scope, "training": True}
    results = []
    for workspace in (None, 1, 5000, 50_000, 1 << 30):
        torch.manual_seed(1)
        results.append(run(parts, **how, drop_path=drop, workspace_bytes=workspace))
    for result in results[1:]:
        close(result, results[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_deterministic(kernel: str) -> None:
    parts = layer(300, 500, (2, 7))
    for one, two in zip(run(parts, sparsity=0.9, kernel=kernel), run(parts, sparsity=0.9, kernel=kernel), strict=True):
        assert torch.equal(one, two)


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


def test_autocast_and_half_factors() -> None:
    x, weight, bias, a, b, g = layer()
    with torch.autocast("cpu", torch.bfloat16):
        got = run((x, weight, bias, a, b, g), sparsity=0.5)
        assert got[0].dtype == torch.bfloat16 and got[1].dtype == got[2].dtype == torch.float32
    close([t.float() for t in got], run((x, weight, bias, a, b, g), sparsity=0.5), 2e-2)
    low = run((x, weight, bias, *(t.detach().bfloat16().requires_grad_() for t in (a, b)), g), sparsity=0.5)
    assert [t.dtype for t in low] == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


def test_state_changes_no_result() -> None:
    x, weight, bias, a, b, g = layer(200, 300, (2, 9))
    state = ThresholdState()
    for _ in range(6):
        for one, two in zip(
            run((x, weight, bias, a, b, g), sparsity=0.9, state=state),
            run((x, weight, bias, a, b, g), sparsity=0.9), strict=True,
        ):  # fmt: skip
            assert torch.equal(one, two)
        with torch.no_grad():
            a.add_(0.02 * torch.randn_like(a).mul_(a.std()))
    with torch.no_grad():
        a.mul_(1000)  # far outside any bracket
    got = run((x, weight, bias, a, b, g), sparsity=0.9, state=state)
    assert torch.equal(got[0], run((x, weight, bias, a, b, g), sparsity=0.9)[0])


def test_refreshing_every_few_steps() -> None:
    x, weight, bias, a, b, _ = layer(64, 64)
    state, exact = ThresholdState(refresh_every=3), []
    seen = []
    for _ in range(6):
        for _ in range(2):  # a recomputed forward sees the same threshold
            y = snell_linear(x, weight, bias, a, b, sparsity=0.9, state=state)
        seen.append(torch.equal(y, snell_linear(x, weight, bias, a, b, sparsity=0.9)))
        exact.append(golden.error(y, snell_linear(x, weight, bias, a, b, sparsity=0.9)))
        state.step()
        with torch.no_grad():
            a.mul_(1.001)
    assert seen == [True, False, False, True, False, False]
    assert max(exact) < 1e-4
    snell_linear(x, weight, bias, a, b, sparsity=0.5, state=state)
    assert state.age == 0  # another sparsity renews it at once


def test_custom_op_registration() -> None:
    x, weight, bias, a, b, g = layer(groups=3)
    plan = make_plan(a, b, 0.5, "distance", "released", 3, "group")
    arguments = (x, weight, bias, a, b, None, None, None, None, None, *library.static(plan))
    torch.library.opcheck(library.linear, arguments)
    arguments = (g, x.detach(), weight, a.detach(), b.detach(), None, torch.zeros(2, 3), None, None)
    torch.library.opcheck(library.linear_backward, (*arguments, *library.static(plan), True))
    torch.library.opcheck(library.merge, (a.detach(), b.detach(), None, *library.static(plan)))


@pytest.mark.parametrize("how", [{}, {"dropout": 0.1, "drop_path": 0.1, "training": True}, {"kernel": "snella"}])
def test_compiles_without_a_graph_break(how: dict[str, Any]) -> None:
    x, weight, bias, a, b, g = layer()
    state = ThresholdState()

    def function(*inputs: Tensor) -> Tensor:
        return torch.relu(snell_linear(inputs[0], weight, bias, *inputs[1:], sparsity=0.5, state=state, **how))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for f in (function, compiled, compiled):
        torch.manual_seed(2)
        y = f(x, a, b)
        results.append([y.detach(), *torch.autograd.grad(y, (x, a, b), g)])
    close(results[1], results[0])
    close(results[2], results[0])


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


def test_equal_factors_have_gradient_zero() -> None:
    """The subgradient at distance 0, not NaN."""
    a = torch.ones(5, 4, requires_grad=True)
    b = torch.ones(6, 4, requires_grad=True)
    x = torch.randn(3, 5)
    y = snell_linear(x, torch.zeros(6, 5), None, a, b, sparsity=0.0)
    grads = torch.autograd.grad(y.sum(), (a, b))
    assert not y.any() and not grads[0].any() and not grads[1].any()
