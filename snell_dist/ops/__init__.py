"""The SNELL operator (placeholder slice: plain autograd reference)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def init_factors(in_features: int, out_features: int, rank: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    a, b = (in_features * rank / 2) ** -0.5, (out_features // groups * rank / 2) ** -0.5
    return torch.empty(in_features, groups * rank).uniform_(-a, a), torch.empty(out_features, rank).uniform_(-b, b)


def merge_delta(a: Tensor, b: Tensor, *, sparsity: float, sparsify: str = "released", groups: int = 1) -> Tensor:
    deltas = []
    for one, two in zip(a.chunk(groups, 1), b.chunk(groups, 0), strict=True):
        half = one.shape[1] // 2
        k = 0.1 * torch.cdist(two[:, :half], one[:, :half]) - 0.1 * torch.cdist(two[:, half:], one[:, half:])
        m = k.detach().abs()
        deltas.append(k if sparsity == 0 else k * m * (m > torch.quantile(m.flatten(), sparsity)))
    return torch.cat(deltas)


def snell_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *, sparsity: float, sparsify: str = "released",
    groups: int = 1, dropout: float = 0.0, drop_path: float = 0.0, training: bool = False,
) -> Tensor:  # fmt: skip
    delta = merge_delta(a, b, sparsity=sparsity, sparsify=sparsify, groups=groups)
    return F.linear(x, weight, bias) + F.linear(F.dropout(x, dropout, training), delta)
