"""The operator as the paper writes it: short, by autograd, any dtype and device.

y = x W0^T + bias + drop_path(dropout(x) delta^T),   delta = K * factor(|K|, t)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from snell_dist.ops import kernels, sparsify, threshold
from snell_dist.ops.plan import Plan
from snell_dist.ops.regularize import keep_scale


def merge_delta(a: Tensor, b: Tensor, params: Tensor | None, plan: Plan) -> Tensor:
    """a [in, groups*rank], b [out, rank], params [scalars, groups] -> delta [out, in] in the factors' dtype."""
    kernel = kernels.find(plan.kernel)
    merged = []
    for g, (one, two) in enumerate(zip(a.chunk(plan.groups, 1), b.chunk(plan.groups, 0), strict=True)):
        merged.append(kernel.merged(one, two, kernels.scalars(kernel, None if params is None else params[:, g])))
    if plan.scope == "matrix":
        merged = [torch.cat(merged)]
    return torch.cat([_sparse(k, s, plan) for k, s in zip(merged, plan.sparsities, strict=True)])


def _sparse(k: Tensor, sparsity: float, plan: Plan) -> Tensor:
    if plan.dense(sparsity):
        return k
    m = k.detach().abs()
    return k * sparsify.factor(m, threshold.by_sorting(m, sparsity, plan.interpolated), plan.sparsify)


def snell_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, params: Tensor | None,
    seed: Tensor | None, path: Tensor | None, plan: Plan,
) -> Tensor:  # fmt: skip
    """x [..., in] -> y [..., out] in x's dtype; seed and path are what regularize.py drew, or None."""
    delta = merge_delta(a, b, params, plan).to(x.dtype)
    dropped = x if seed is None else x * keep_scale(seed, x.shape, plan.dropout, x.dtype)
    adapted = F.linear(dropped, delta)
    if path is not None:
        adapted = adapted * path.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    if weight is None:
        return adapted
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)) + adapted
