"""The sigmoid kernel: K_oi = alpha / (1 + exp(-beta b_o . a_i)) + gamma (SNELL, table A6).

The paper prints no start values; alpha = beta = 1 and gamma = -1/2 start near zero.
"""

import torch
from torch import Tensor

SEGMENTS = 1
SCALARS = {"alpha": 1.0, "beta": 1.0, "gamma": -0.5}
DENSE_AT_ZERO = True
ROWS_INDEPENDENT = True


def merged(a: Tensor, b: Tensor, scalars: Tensor | None) -> Tensor:
    assert scalars is not None
    alpha, beta, gamma = scalars
    return alpha * torch.sigmoid(beta * (b @ a.t())) + gamma
