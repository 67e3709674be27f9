"""The radial basis kernel: K_oi = alpha exp(-beta ||b_o - a_i||^2) + gamma (table A6 of the paper).

The paper names the scalars and not their values. Here alpha = beta = 1 and gamma = -1, so that equal
factors give no delta; pass `kernel_params` to set or to train them.
"""

from __future__ import annotations

from torch import Tensor

AXIS = "rows"
LIVE = 7
DENSE_AT_ZERO = True
SEGMENTS = 1
PARAMS = {"alpha": 1.0, "beta": 1.0, "gamma": -1.0}


def merged(a: Tensor, b: Tensor, params: dict[str, Tensor]) -> Tensor:
    """a [in, r], b [out, r] -> K [out, in]."""
    squared = b.square().sum(-1, keepdim=True) + a.square().sum(-1).unsqueeze(-2) - 2 * b @ a.mT
    # exp(z) = 1 + expm1(z): near z = 0 the digits of z are not lost beside 1.
    return params["alpha"] * (-params["beta"] * squared).expm1() + (params["alpha"] + params["gamma"])


def pullback(a: Tensor, b: Tensor, params: dict[str, Tensor], grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """dL/da, dL/db, dL/dparams of K, or of columns of it, given dL/dK [out, in]."""
    squared = b.square().sum(1, keepdim=True) + a.square().sum(1) - 2 * b @ a.mT
    near = grad * (-params["beta"] * squared).exp()
    slope = -2 * params["alpha"] * params["beta"] * near
    own = {"alpha": near.sum(), "beta": -params["alpha"] * (near * squared).sum(), "gamma": grad.sum()}
    return a * slope.sum(0).unsqueeze(1) - slope.mT @ b, b * slope.sum(1, keepdim=True) - slope @ a, own
