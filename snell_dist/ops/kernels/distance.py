"""The paper's piecewise linear kernel: the difference of two Euclidean distances.

K_oi = 0.1 ||b1_o - a1_i|| - 0.1 ||b2_o - a2_i||, coefficients fixed as in the released code.
A distance of 0 has gradient 0 (the subgradient of the norm that the released code takes).
"""

from __future__ import annotations

import torch
from torch import Tensor

AXIS = "rows"
LIVE = 5  # two distances, K, its factor; masks of the selection
DENSE_AT_ZERO = True
SEGMENTS = 2
PARAMS: dict[str, float] = {}
SCALE = 0.1


def merged(a: Tensor, b: Tensor, params: dict[str, Tensor]) -> Tensor:
    """a [in, r], b [out, r] -> K [out, in]."""
    (a1, a2), (b1, b2) = a.chunk(2, 1), b.chunk(2, 1)
    return SCALE * torch.cdist(b1, a1) - SCALE * torch.cdist(b2, a2)


class Engine:
    """Tiles of K with the distances in product form, as the library's cdist takes them, and their gradient.

    The factors are scaled once, so the distances come out scaled. With q = +-dL/dK / distance:
    dL/db_o = 0.1 (b_o sum_i q_oi - sum_i q_oi a_i) and the mirror for a; a column of ones makes the sums part of
    the two thin products.
    """

    SLOTS = 4

    def __init__(self, a: Tensor, b: Tensor, params: Tensor | None) -> None:
        self._a = [_with_ones(half) for half in (SCALE * a).chunk(2, 1)]  # [in, r/2 + 1]
        self._b = [_with_ones(half) for half in (SCALE * b).chunk(2, 1)]
        self._left = [torch.cat([-2 * h[:, :-1], _squared(h), h[:, -1:]], 1) for h in self._b]
        self._right = [torch.cat([h, _squared(h)], 1) for h in self._a]  # [in, r/2 + 2]
        self._sum_a = [torch.zeros_like(h) for h in self._a]
        self._sum_b = [torch.zeros_like(h) for h in self._b]

    def build(self, rows: slice, cols: slice, keep: bool, pool: Tensor, out: Tensor | None) -> Tensor:
        one, two, third, _ = pool
        for left, right, distance in zip(self._left, self._right, (one, two), strict=True):
            torch.mm(left[rows], right[cols].t(), out=distance).clamp_min_(0).sqrt_()
        self._place, self._distances = (rows, cols), (one, two)
        return torch.sub(one, two, out=third if out is None else out)

    def backward(self, grad: Tensor) -> None:
        rows, cols = self._place
        for h, (sign, distance) in enumerate(zip((1, -1), self._distances, strict=True)):
            torch.threshold_(distance, 0, torch.inf)  # grad / infinity: the gradient 0 of distance 0
            q = torch.div(grad, distance, out=distance)
            self._sum_b[h][rows].addmm_(q, self._a[h][cols], alpha=sign)
            self._sum_a[h][cols].addmm_(q.t(), self._b[h][rows], alpha=sign)

    def gradients(self) -> tuple[Tensor, Tensor, None]:
        return _fold(self._a, self._sum_a), _fold(self._b, self._sum_b), None


def _with_ones(half: Tensor) -> Tensor:
    return torch.cat([half, torch.ones_like(half[:, :1])], 1)


def _squared(half: Tensor) -> Tensor:
    """Squared norm [features, 1] of a half that carries a column of ones."""
    return half[:, :-1].square().sum(1, keepdim=True)


def _fold(halves: list[Tensor], sums: list[Tensor]) -> Tensor:
    """0.1 (own sum q - sum q other) for both halves [features, r]."""
    return torch.cat([SCALE * (h[:, :-1] * s[:, -1:] - s[:, :-1]) for h, s in zip(halves, sums, strict=True)], 1)
