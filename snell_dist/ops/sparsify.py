"""What survives the threshold: delta = K * factor(|K|, t), the factor a constant for the gradient.

    released   factor = m where m > t            values K|K|, as in the paper's code
    paper      factor = max(m - t, 0)            equation 5, soft threshold
    hard       factor = 1 where m > t            keeps the value
    dense      factor = 1                        no threshold, of any kernel; asks for sparsity 0
Strict: an element equal to the threshold is removed. A NaN element stays NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPARSIFY = ("released", "paper", "hard", "dense")


def factor(magnitude: Tensor, threshold: Tensor, sparsify: str) -> Tensor:
    """magnitude [out, in], threshold 0-d -> what to multiply K by [out, in]."""
    if sparsify == "paper":
        return (magnitude - threshold).clamp_min(0)
    zero = torch.zeros((), dtype=magnitude.dtype, device=magnitude.device)
    kept = torch.where(magnitude <= threshold, zero, magnitude)
    return kept if sparsify == "released" else kept.sign()
