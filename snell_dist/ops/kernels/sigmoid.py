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
    return params["alpha"] * (params["beta"] * (b @ a.mT)).sigmoid() + params["gamma"]
