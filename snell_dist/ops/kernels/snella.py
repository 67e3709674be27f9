"""SNELLA's mixture kernel: K + alpha softmax(K / gamma) + beta, K the distance kernel's matrix.

The softmax runs over the out axis, for each input column, so rows cannot be made tile by tile: the
workspace bound does not hold for this kernel. Source: SNELLA (2025), values as in the released code.
"""

from torch import Tensor

from snell_dist.ops.kernels import distance

SEGMENTS = distance.SEGMENTS
SCALARS = {"alpha": 1.0, "gamma": 1.0, "beta": 0.0}
DENSE_AT_ZERO = False
ROWS_INDEPENDENT = False


def merged(a: Tensor, b: Tensor, scalars: Tensor | None) -> Tensor:
    assert scalars is not None
    alpha, gamma, beta = scalars
    k = distance.merged(a, b, None)
    return k + alpha * (k / gamma).softmax(dim=0) + beta
