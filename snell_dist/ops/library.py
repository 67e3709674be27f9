"""The fused operator as torch custom ops: what autograd saves, what torch.compile sees.

Forward keeps x, the weight parameter itself (no view, cast or copy, so that sharded engines may take it away and bring
it back), the factors, and one threshold a group. The static side travels as plain arguments, which schemas ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snell_dist.ops import fused, merging
from snell_dist.ops.plan import Plan


def _plan(names: str, groups: int, sparsities: Sequence[float], dropout: float, workspace: int) -> Plan:
    kernel, sparsify, scope = names.split(",")
    return Plan(kernel, sparsify, groups, scope, tuple(sparsities), dropout, workspace)


def static(plan: Plan) -> tuple[str, int, list[float], float, int]:
    """The plan as the custom ops take it."""
    names = f"{plan.kernel},{plan.sparsify},{plan.scope}"
    return names, plan.groups, list(plan.sparsities), plan.dropout, plan.workspace


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}


def _op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function a custom op of this name."""

    def register(implementation: Callable[..., Any]) -> Any:
        _IMPLEMENTATIONS[name] = implementation
        return torch.library.custom_op(name, implementation, mutates_args=())

    return register


def inside(operator: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """What one of these ops does, as a function of the op's own arguments; None for an op that is not ours.

    A dispatch mode sees a custom op from outside; called under the mode again, this shows it the ops within.
    """
    return _IMPLEMENTATIONS.get(operator._schema.name)


@_op("snell::merge")
def merge(
    a: Tensor, b: Tensor, params: Tensor | None,
    names: str, groups: int, sparsities: Sequence[float], dropout: float, workspace: int,
) -> Tensor:  # fmt: skip
    """merging.merge_delta: [out, in]."""
    return merging.merge_delta(a, b, params, _plan(names, groups, sparsities, dropout, workspace))


@merge.register_fake
def _(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    return a.new_empty(len(b), len(a))


@_op("snell::linear")
def linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor, params: Tensor | None,
    given: Tensor | None, hint: Tensor | None, seed: Tensor | None, path: Tensor | None,
    names: str, groups: int, sparsities: Sequence[float], dropout: float, workspace: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """fused.forward: y [..., out] and thresholds [2, groups], which carry no gradient."""
    plan = _plan(names, groups, sparsities, dropout, workspace)
    return fused.forward(x, weight, bias, a, b, params, given, hint, seed, path, plan)


@linear.register_fake
def _(x: Tensor, weight: Any, bias: Any, a: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], len(b)), a.new_empty(2, rest[6])


@_op("snell::linear_backward")
def linear_backward(
    gy: Tensor, x: Tensor, weight: Tensor | None, a: Tensor, b: Tensor, params: Tensor | None,
    found: Tensor | None, seed: Tensor | None, path: Tensor | None,
    names: str, groups: int, sparsities: Sequence[float], dropout: float, workspace: int, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """fused.backward; gradients that are not there are empty."""
    plan = _plan(names, groups, sparsities, dropout, workspace)
    gx, grad_a, grad_b, grad_params = fused.backward(gy, x, weight, a, b, params, found, seed, path, plan, needs_x)
    return gx, grad_a, grad_b, a.new_empty(0) if grad_params is None else grad_params


@linear_backward.register_fake
def _(gy: Tensor, x: Tensor, weight: Any, a: Tensor, b: Tensor, params: Tensor | None, *rest: Any) -> Any:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if rest[-1] else x.new_empty(0)
    return grad_x, a.new_empty(a.shape), b.new_empty(b.shape), a.new_empty(0 if params is None else params.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, bias, a, b, params, given, _, seed, path, *ctx.static = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, a, b, params, output[1] if given is None else given, seed, path)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, gy: Tensor, _: Any) -> Any:
    x, weight, *rest = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    gx, grad_a, grad_b, grad_params = linear_backward(gy, x, weight, *rest, *ctx.static, needs_x)
    flat = fused.rows(gy)
    # Mostly frozen; a weight that trains costs one more product.
    grad_weight = (flat.t() @ fused.rows(x)).to(weight.dtype) if needs_weight else None
    grad_bias = flat.sum(0).to(ctx.bias_dtype) if needs_bias else None
    return (
        gx if needs_x else None, grad_weight, grad_bias, grad_a, grad_b, None if rest[2] is None else grad_params,
        *[None] * (4 + len(ctx.static)),
    )  # fmt: skip


linear.register_autograd(_differentiate, setup_context=_save)
