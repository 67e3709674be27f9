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


def pullback(a: Tensor, b: Tensor, params: dict[str, Tensor], grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """dL/da, dL/db, dL/dparams of K, or of columns of it, given dL/dK [out, in]."""
    d, (alpha, gamma) = distance.merged(a, b, {}), (params["alpha"], params["gamma"])
    soft = (d / gamma).softmax(0)
    own = {"alpha": (grad * soft).sum(), "beta": grad.sum()}
    through = soft * alpha * grad
    through = through - soft * through.sum(0)  # dL/d(D / gamma)
    own["gamma"] = -(through * d).sum() / gamma.square()
    return *distance.pullback(a, b, {}, grad + through / gamma)[:2], own
