"""The paper's piecewise linear kernel (SNELL, section 3.2; coefficients as in the released code).

K_oi = 0.1 ||b1_o - a1_i|| - 0.1 ||b2_o - a2_i||, the segments being the halves of each factor's columns.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SEGMENTS = 2
SCALARS: dict[str, float] = {}
DENSE_AT_ZERO = True
ROWS_INDEPENDENT = True
COEFFICIENT = 0.1


def merged(a: Tensor, b: Tensor, scalars: Tensor | None) -> Tensor:
    (a1, a2), (b1, b2) = a.chunk(2, dim=1), b.chunk(2, dim=1)
    return COEFFICIENT * torch.cdist(b1, a1) - COEFFICIENT * torch.cdist(b2, a2)


class Tiles:
    """See `TilesLike`. The distance is taken in product form, as the library's cdist takes it.

    With q = dL/dK (+-0.1) / distance: dL/db_o = b_o sum_i q_oi - sum_i q_oi a_i, and the mirror for a: a thin
    product and a row sum for each, made one product by a column of ones. Distance 0 has gradient 0.
    """

    def __init__(self, kernel: ModuleType, a: Tensor, scalars: Tensor | None) -> None:
        self._a = a.chunk(2, dim=1)
        # [a, 1, |a|^2] against [-2 b, |b|^2, 1] gives |b - a|^2.
        self._right = [torch.cat([h, torch.ones_like(h[:, :1]), h.square().sum(1, keepdim=True)], 1) for h in self._a]
        self._sum = [torch.zeros_like(r[:, :-1]) for r in self._right]

    def merge(self, b: Tensor, keep: bool) -> tuple[Tensor, Any]:
        halves = b.chunk(2, dim=1)
        distances = []
        for half, right in zip(halves, self._right, strict=True):
            left = torch.cat([-2 * half, half.square().sum(1, keepdim=True), torch.ones_like(half[:, :1])], 1)
            distances.append((left @ right.t()).clamp_min_(0).sqrt_())
        first, second = distances
        k = first.sub(second) if keep else first.sub_(second)
        return k.mul_(COEFFICIENT), (halves, distances) if keep else None

    def gradient(self, grad: Tensor, kept: Any) -> Tensor:
        grad_b = []
        for half, distance, right, total, sign in zip(*kept, self._right, self._sum, (1, -1), strict=True):
            zero = distance == 0
            q = torch.div(grad, distance, out=distance).mul_(sign * COEFFICIENT).masked_fill_(zero, 0)
            by_b = q @ right[:, :-1]  # [n, rank/2 + 1]: sum_i q a_i, and sum_i q
            grad_b.append(half * by_b[:, -1:] - by_b[:, :-1])
            total.addmm_(q.t(), torch.cat([half, torch.ones_like(half[:, :1])], 1))
        return torch.cat(grad_b, 1)

    def sums(self) -> tuple[Tensor, Tensor | None]:
        grads = [half * total[:, -1:] - total[:, :-1] for half, total in zip(self._a, self._sum, strict=True)]
        return torch.cat(grads, 1), None
