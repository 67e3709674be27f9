"""The sigmoid kernel: K_oi = alpha / (1 + exp(-beta b_o . a_i)) + gamma (table A6 of the paper).

The paper names the scalars and not their values. Here alpha = beta = 1 and gamma = -1/2, so that
orthogonal factors give no delta; pass `kernel_params` to set or to train them.
"""

from __future__ import annotations

from torch import Tensor

AXIS = "rows"
LIVE = 7
DENSE_AT_ZERO = True
SEGMENTS = 1
PARAMS = {"alpha": 1.0, "beta": 1.0, "gamma": -0.5}


def merged(a: Tensor, b: Tensor, params: dict[str, Tensor]) -> Tensor:
    """a [in, r], b [out, r] -> K [out, in]."""
    # 1/(1 + exp(-z)) = 1/2 + tanh(z/2)/2: near z = 0 the digits of z are not lost beside 1/2.
    half = params["alpha"] / 2
    return half * (params["beta"] / 2 * (b @ a.mT)).tanh() + (half + params["gamma"])


def pullback(a: Tensor, b: Tensor, params: dict[str, Tensor], grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """dL/da, dL/db, dL/dparams of K, or of columns of it, given dL/dK [out, in]."""
    z = b @ a.mT
    bent = (params["beta"] / 2 * z).tanh()
    slope = grad * (1 - bent.square()) * (params["alpha"] / 4)  # dK/d(beta z)
    own = {"alpha": (grad * (1 + bent)).sum() / 2, "beta": (slope * z).sum(), "gamma": grad.sum()}
    return params["beta"] * slope.mT @ b, params["beta"] * slope @ a, own
