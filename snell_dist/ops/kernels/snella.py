"""SNELLA's mixed kernel: K = D + alpha softmax(D / gamma) + beta, D the distance kernel.

The softmax runs over the out axis, for each input column. alpha, gamma, beta are trained (released code).
"""

from __future__ import annotations

from torch import Tensor

from snell_dist.ops.kernels import distance

AXIS = "columns"
LIVE = 16
DENSE_AT_ZERO = False
SEGMENTS = 2
PARAMS = {"alpha": 1.0, "gamma": 1.0, "beta": 0.0}


def merged(a: Tensor, b: Tensor, params: dict[str, Tensor]) -> Tensor:
    """a [in, r], b [out, r] -> K [out, in]."""
    d = distance.merged(a, b, {})
    return d + params["alpha"] * (d / params["gamma"]).softmax(0) + params["beta"]
