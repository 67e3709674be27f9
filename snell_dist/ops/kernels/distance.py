"""The paper's piecewise linear kernel: the difference of two Euclidean distances.

K_oi = 0.1 ||b1_o - a1_i|| - 0.1 ||b2_o - a2_i||, coefficients fixed as in the released code.
A distance of 0 has gradient 0 (the subgradient of the norm that the released code takes).
"""

from __future__ import annotations

import torch
from torch import Tensor

DENSE_AT_ZERO = True
SEGMENTS = 2
PARAMS: dict[str, float] = {}
SCALE = 0.1


def merged(a: Tensor, b: Tensor, params: dict[str, Tensor]) -> Tensor:
    """a [in, r], b [out, r] -> K [out, in]."""
    (a1, a2), (b1, b2) = a.chunk(2, 1), b.chunk(2, 1)
    return SCALE * torch.cdist(b1, a1) - SCALE * torch.cdist(b2, a2)
