"""Method mixk, the mixed kernel that keeps every entry, against its formula in float64 numpy."""

import golden
import naive
import numpy as np
import pytest
import torch
from torch import nn

import snell_dist
from snell_dist.ops import merge_delta

ALPHA, GAMMA, BETA = [0.7, 1.2, -0.4], [1.3, 0.8, 0.5], [0.01, -0.02, 0.0]


@pytest.mark.parametrize(("groups", "rows", "cols", "rank"), [(1, 9, 7, 4), (3, 8, 13, 6), (3, 30, 40, 2)])
def test_output_and_every_gradient(groups: int, rows: int, cols: int, rank: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(cols, groups * rows)
    model = snell_dist.adapt(nn.Sequential(linear), "mixk", rank=rank, groups={"0": groups}).double()
    layer, x, g = model[0], torch.randn(5, cols).double().requires_grad_(), torch.randn(5, groups * rows).double()
    scalars = {"alpha": ALPHA[:groups], "gamma": GAMMA[:groups], "beta": BETA[:groups]}
    with torch.no_grad():
        for name, values in scalars.items():
            layer.get_parameter(name).copy_(torch.tensor(values))
    y = model(x)
    y.backward(g)

    delta, wanted = [], {name: [] for name in ("a", "b", *scalars)}
    a, b, up = layer.a.detach().numpy(), layer.b.detach().numpy(), (g.T @ x.detach()).numpy()
    for i in range(groups):
        own = slice(i * rows, (i + 1) * rows)
        alpha, gamma, beta = (layer.get_parameter(name)[i].item() for name in scalars)
        k, by_b, by_a = naive.kernel("distance", a[:, i * rank : (i + 1) * rank], b[own], {})
        soft, gd = naive.softmax(k / gamma), up[own]
        delta.append(k + alpha * soft + beta)
        bent = soft * (gd - (soft * gd).sum(0))  # dL/d(k / gamma), over alpha
        gk = gd + alpha / gamma * bent
        wanted["a"].append((gk[..., None] * by_a).sum(0))
        wanted["b"].append((gk[..., None] * by_b).sum(1))
        wanted["alpha"].append((gd * soft).sum())
        wanted["gamma"].append(-alpha / gamma**2 * (bent * k).sum())
        wanted["beta"].append(gd.sum())
    whole = linear.weight.detach().numpy() + np.concatenate(delta)
    assert np.allclose(y.detach().numpy(), x.detach().numpy() @ whole.T + linear.bias.detach().numpy(), rtol=1e-12)
    assert np.allclose(x.grad.numpy(), g.numpy() @ whole, rtol=1e-12)
    for name, parts in wanted.items():
        expected = np.concatenate(parts, int(name == "a")) if name in "ab" else np.array(parts)
        assert np.allclose(layer.get_parameter(name).grad.numpy(), expected, rtol=1e-9, atol=1e-12), name
    assert (np.concatenate(delta) != 0).all()
    merged = snell_dist.merge(model)[0].weight.detach().numpy()
    assert np.allclose(merged, whole, rtol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("name", [n for n in golden.OPERATORS if golden.CASES[n]["kind"] == "SNELLA"])
def test_it_is_the_released_mixture_before_sparsification(name: str, impl: str) -> None:
    data, _ = golden.operator(name)
    params = {key: data[key] for key in ("alpha", "gamma", "beta")}
    how = {"kernel": "snella", "kernel_params": params, "sparsity": 0.0, "sparsify": "dense"}
    delta = merge_delta(data["A"], data["B"], impl=impl, **how)
    assert golden.error(delta, data["kernel"]) < 1e-6
