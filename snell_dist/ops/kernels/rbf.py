"""The radial basis function kernel: K_oi = alpha exp(-beta ||b_o - a_i||^2) + gamma (SNELL, table A6).

The paper prints no start values; alpha = beta = 1 and gamma = -1 start near zero.
"""

from torch import Tensor

SEGMENTS = 1
SCALARS = {"alpha": 1.0, "beta": 1.0, "gamma": -1.0}
DENSE_AT_ZERO = True
ROWS_INDEPENDENT = True


def merged(a: Tensor, b: Tensor, scalars: Tensor | None) -> Tensor:
    assert scalars is not None
    alpha, beta, gamma = scalars
    squared = b.square().sum(1, keepdim=True) + a.square().sum(1) - 2 * (b @ a.t())
    return alpha * (-beta * squared.clamp_min(0)).exp() + gamma
