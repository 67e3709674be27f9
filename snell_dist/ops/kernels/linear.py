"""The linear kernel, LoRA's product: K_oi = b_o . a_i (table A6 of the paper)."""

from __future__ import annotations

from torch import Tensor

AXIS = "rows"
LIVE = 4
DENSE_AT_ZERO = True
SEGMENTS = 1
PARAMS: dict[str, float] = {}


def merged(a: Tensor, b: Tensor, params: dict[str, Tensor]) -> Tensor:
    """a [in, r], b [out, r] -> K [out, in]."""
    return b @ a.mT


def pullback(a: Tensor, b: Tensor, params: dict[str, Tensor], grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """dL/da, dL/db, dL/dparams of K, or of columns of it, given dL/dK [out, in]."""
    return grad.mT @ b, grad @ a, {}
