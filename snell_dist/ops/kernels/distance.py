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
    (a1, a2), (b1, b2) = a.chunk(2, -1), b.chunk(2, -1)
    return SCALE * torch.cdist(b1, a1) - SCALE * torch.cdist(b2, a2)


def pullback(a: Tensor, b: Tensor, params: dict[str, Tensor], grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """dL/da, dL/db, dL/dparams of K, or of columns of it, given dL/dK [out, in]."""
    down, up = [], []
    for sign, one, two in zip((SCALE, -SCALE), a.chunk(2, 1), b.chunk(2, 1), strict=True):
        far = torch.cdist(two, one)
        q = sign * grad / torch.where(far > 0, far, torch.inf)
        down.append(one * q.sum(0).unsqueeze(1) - q.mT @ two)
        up.append(two * q.sum(1, keepdim=True) - q @ one)
    return torch.cat(down, 1), torch.cat(up, 1), {}


class Engine:
    """Tiles of K with the distances in product form, as the library's cdist takes them, and their gradient.

    [-2 b, |b|^2, 1] times [a, 1, |a|^2]^T is |b - a|^2; the factors are scaled once, so distances come out scaled.
    With q = +-dL/dK / distance, dL/db_o = 0.1 (b_o sum_i q_oi - sum_i q_oi a_i), and the mirror for a: both sums of
    each come out of one thin product with the same arrays.
    """

    SLOTS = 4

    def __init__(self, a: Tensor, b: Tensor, params: Tensor | None) -> None:
        scaled_a, scaled_b = _halves(a), _halves(b)
        ones_a, ones_b = torch.ones_like(scaled_a[..., :1]), torch.ones_like(scaled_b[..., :1])
        self._left = torch.cat([-2 * scaled_b, scaled_b.square().sum(2, keepdim=True), ones_b], 2)  # [2, out, r/2 + 2]
        self._right = torch.cat([scaled_a, ones_a, scaled_a.square().sum(2, keepdim=True)], 2)  # [2, in, r/2 + 2]
        self._sum_a: Tensor | None = None

    def build(self, rows: slice, cols: slice, keep: bool, pool: Tensor, out: Tensor | None) -> Tensor:
        self._distances, self._place = pool[:2], (rows, cols)
        left, right = self._left[:, rows], self._right[:, cols]
        for half, distance in enumerate(self._distances):
            torch.mm(left[half], right[half].t(), out=distance).clamp_min_(0).sqrt_()
        return torch.sub(pool[0], pool[1], out=pool[2] if out is None else out)

    def backward(self, grad: Tensor) -> None:
        if self._sum_a is None:
            self._sum_a, self._sum_b = torch.zeros_like(self._right), torch.zeros_like(self._left)
        rows, cols = self._place
        left, right = self._left[:, rows], self._right[:, cols]
        sum_b, sum_a = self._sum_b[:, rows], self._sum_a[:, cols]
        for half, distance in enumerate(self._distances):
            torch.threshold_(distance, 0, torch.inf)  # grad / infinity: the gradient 0 of distance 0
            q = torch.div(grad, distance, out=distance)
            sum_b[half].addmm_(q, right[half], alpha=1 - 2 * half)
            sum_a[half].addmm_(q.t(), left[half], alpha=1 - 2 * half)

    def gradients(self) -> tuple[Tensor, Tensor, None]:
        if self._sum_a is None:
            return torch.zeros_like(_whole(self._right)), torch.zeros_like(_whole(self._left)), None
        # sums over out of q (-2 b), q |b|^2, q; and over in of q a, q, q |a|^2
        grad_a, grad_b = self._sum_a[..., :-2], self._sum_b[..., :-2]
        grad_a.div_(2).addcmul_(self._right[..., :-2], self._sum_a[..., -1:])
        grad_b.neg_().addcmul_(self._left[..., :-2], self._sum_b[..., -2:-1], value=-0.5)
        return _whole(grad_a, 0).mul_(SCALE), _whole(grad_b, 0).mul_(SCALE), None


def _halves(factor: Tensor) -> Tensor:
    """[features, r] -> scaled [2, features, r/2]."""
    return (SCALE * factor).unflatten(1, (2, factor.shape[1] // 2)).transpose(0, 1)


def _whole(halves: Tensor, extra: int = 2) -> Tensor:
    """[2, features, r/2 + extra] -> [features, r]."""
    return halves[..., : halves.shape[2] - extra].transpose(0, 1).flatten(1)
