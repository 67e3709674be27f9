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
    return params["alpha"] * (-params["beta"] * squared).exp() + params["gamma"]
