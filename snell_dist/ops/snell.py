"""The public operator: checks its arguments, draws the random numbers, picks an implementation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from snell_dist.ops import kernels, library, reference
from snell_dist.ops.plan import Plan
from snell_dist.ops.regularize import draw_path, draw_seed
from snell_dist.ops.sparsify import SPARSIFY
from snell_dist.standing import autocast_type

IMPLS = ("auto", "fused", "reference")
SCOPES = ("group", "matrix")
Params = Mapping[str, Tensor | float]


class ThresholdState:
    """What a layer may remember between calls; keep one for each layer.

    refresh_every=1: the last thresholds only tell where to look first; results do not depend on them.
    refresh_every=k > 1 is an approximation: thresholds are found anew only after k calls of `step`, which the caller
    makes once an optimizer step, so that a recomputed forward sees the same ones. A changed sparsity also renews them.
    """

    def __init__(self, refresh_every: int = 1) -> None:
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be a positive number of steps; got {refresh_every}")
        self.refresh_every = refresh_every
        self.age = 0
        self.found: Tensor | None = None
        self.key = ""

    def step(self) -> None:
        self.age += 1

    def look_up(self, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
        """Thresholds [2, groups] to use as they are, and to start looking from; either may be None."""
        if self.found is None or self.key != plan.key:
            return None, None
        if self.refresh_every > 1 and self.age < self.refresh_every:
            return self.found, None
        return None, self.found

    def keep(self, plan: Plan, found: Tensor) -> None:
        if not plan.all_dense:
            self.found, self.key, self.age = found, plan.key, 0


def snell_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    sparsity: float | Sequence[float],
    kernel: str = "distance",
    sparsify: str = "released",
    groups: int = 1,
    impl: str = "auto",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    training: bool = False,
    sparsity_scope: str = "group",
    kernel_params: Params | None = None,
    workspace_bytes: int | None = None,
    state: ThresholdState | None = None,
) -> Tensor:
    """y = x W0^T + bias + drop_path(dropout(x) delta^T); x [..., in] -> y [..., out].

    weight [out, in], frozen or not; a [in, groups*rank], b [out, rank]: group g owns the g-th of `groups` equal
    row slices of weight and b, and columns [g*rank, (g+1)*rank) of a. y has x's dtype, or autocast's. Without a weight
    (and bias) y is the delta's part alone, for callers that make the frozen product themselves.

    sparsity: the fraction of each matrix that becomes zero, in [0, 1); one number, or one per group. 0 is the
    kernel's matrix itself (but for `snella`, which then loses its smallest entry, as released).
    sparsify: what survivors |K| > t become (sparsify.py); sparsity_scope: a threshold per `group`, or one for
    the whole `matrix`. kernel: a file of kernels/; kernel_params: its scalars by name, one per group or for all.
    dropout: on the delta's input; drop_path: of whole samples (x's first dimension) of the delta's output; both
    only where `training`, drawn from torch's generator.
    workspace_bytes: a bound on temporary memory beside x, y and gradients; None: one matrix in the factors' dtype.
    state: what the layer remembers between calls; it saves time. impl: `reference` keeps every intermediate.
    Source: SNELL (Expanding Sparse Tuning for Low Memory Usage, NeurIPS 2024), section 3, and its released code.
    Raises ValueError, in one line, for arguments that do not fit. Factors that are not finite give NaN.
    """
    check_rate("dropout", dropout)
    check_rate("drop_path", drop_path)
    rate = dropout if training else 0.0
    plan = make_plan(a, b, sparsity, kernel, sparsify, groups, sparsity_scope, rate, workspace_bytes)
    check_choice("impl", impl, IMPLS)
    check_layer(x, weight, bias, a, b)
    cast = autocast_type(x.device)
    if torch.is_autocast_enabled(cast):
        x = x.to(torch.get_autocast_dtype(cast))
    seed = draw_seed(x.device) if plan.dropout else None
    samples = x.shape[0] if x.dim() > 1 else 1
    path = draw_path(samples, drop_path, x) if training and drop_path else None
    params = stack_params(kernel, kernel_params, groups, a)
    a, b = wide(a), wide(b)
    with torch.autocast(cast, enabled=False):
        if impl == "reference":
            return reference.snell_linear(x, weight, bias, a, b, params, seed, path, plan)
        given, hint = (None, None) if state is None else state.look_up(plan)
        y, found = library.linear(x, weight, bias, a, b, params, given, hint, seed, path, *library.static(plan))
        if state is not None and given is None:
            state.keep(plan, found)
        return y


def merge_delta(
    a: Tensor,
    b: Tensor,
    *,
    sparsity: float | Sequence[float],
    kernel: str = "distance",
    sparsify: str = "released",
    groups: int = 1,
    sparsity_scope: str = "group",
    kernel_params: Params | None = None,
    impl: str = "auto",
) -> Tensor:
    """The delta [out, in] that `snell_linear` adds to the weight, float32 or the factors' wider dtype.

    ValueError when a factor is not finite: a merged weight is kept, so it is worth the look.
    """
    plan = make_plan(a, b, sparsity, kernel, sparsify, groups, sparsity_scope)
    check_choice("impl", impl, IMPLS)
    for name, factor in (("a", a), ("b", b)):
        if not torch.isfinite(factor).all():
            odd = int((~torch.isfinite(factor)).sum())
            raise ValueError(f"{name} has {odd} of {factor.numel()} entries that are not finite (NaN or infinity)")
    a, b, params = wide(a), wide(b), stack_params(kernel, kernel_params, groups, a)
    with torch.autocast(autocast_type(a.device), enabled=False):
        differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (a, b, params) if t is not None)
        if impl == "reference" or (impl == "auto" and differentiable):
            return reference.merge_delta(a, b, params, plan)
        return library.merge(a, b, params, *library.static(plan))


def init_factors(
    in_features: int, out_features: int, rank: int, groups: int = 1, *, kernel: str = "distance",
    generator: torch.Generator | None = None, device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The released initialisation: a [in, groups*rank], b [out, rank], uniform within 1/sqrt(features * r/segments).

    `features` is in for a and out/groups for b. The delta is not zero at the start.
    """
    check_choice("kernel", kernel, kernels.KERNELS)
    check_rank(rank, kernel)
    if out_features % groups:
        raise ValueError(f"out_features must be a multiple of groups; got {out_features} and {groups}")
    width = rank / kernels.find(kernel).SEGMENTS
    a = torch.empty(in_features, groups * rank, device=device, dtype=dtype)
    b = torch.empty(out_features, rank, device=device, dtype=dtype)
    bound_a, bound_b = (in_features * width) ** -0.5, (out_features // groups * width) ** -0.5
    return a.uniform_(-bound_a, bound_a, generator=generator), b.uniform_(-bound_b, bound_b, generator=generator)


def wide(factor: Tensor) -> Tensor:
    """Half-precision factors are computed with in float32."""
    return factor.float() if factor.dtype in (torch.bfloat16, torch.float16) else factor


def stack_params(kernel: str, given: Params | None, groups: int, like: Tensor) -> Tensor | None:
    """A kernel's scalars as one tensor [scalars, groups], in the order of its PARAMS; None if it has none."""
    defaults: dict[str, float] = kernels.find(kernel).PARAMS
    given = given or {}
    for name in given:
        check_choice(f"kernel_params of kernel {kernel!r}: name", name, tuple(defaults))
    if not defaults:
        return None
    rows = []
    for name, start in defaults.items():
        value = torch.as_tensor(given.get(name, start), dtype=wide(like).dtype, device=like.device)
        if value.numel() not in (1, groups):
            raise ValueError(
                f"kernel_params[{name!r}] must have 1 or {groups} elements (groups); got shape {tuple(value.shape)}"
            )
        rows.append(value.reshape(-1).expand(groups))
    return torch.stack(rows)


def make_plan(
    a: Tensor, b: Tensor, sparsity: float | Sequence[float], kernel: str, sparsify: str, groups: int,
    scope: str, dropout: float = 0.0, workspace_bytes: int | None = None,
) -> Plan:  # fmt: skip
    """Check the factors and the names; ValueError says which argument, its value and what is allowed."""
    check_choice("kernel", kernel, kernels.KERNELS)
    check_choice("sparsify", sparsify, SPARSIFY)
    check_choice("sparsity_scope", scope, SCOPES)
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive integer; got {groups!r}")
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(
            f"a and b must be 2-D, [in, groups*rank] and [out, rank]; got shapes {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.shape[1] != groups * b.shape[1]:
        raise ValueError(f"a must have groups*rank = {groups}*{b.shape[1]} columns (rank from b); got {a.shape[1]}")
    if b.shape[0] % groups:
        raise ValueError(f"b must have a multiple of groups = {groups} rows; got {b.shape[0]}")
    if a.device != b.device or a.dtype != b.dtype:
        raise ValueError(f"a and b must share device and dtype; got {a.device}, {a.dtype} and {b.device}, {b.dtype}")
    check_rank(b.shape[1], kernel)
    count = groups if scope == "group" else 1
    if isinstance(sparsity, str) or not isinstance(sparsity, (int, float, Sequence)):
        raise ValueError(f"sparsity must be a number or a sequence of numbers; got {sparsity!r}")
    each = (sparsity,) * count if isinstance(sparsity, (int, float)) else tuple(sparsity)
    if len(each) != count:
        raise ValueError(f"sparsity must be one number or {count} for sparsity_scope={scope!r}; got {len(each)}")
    for s in each:
        if not 0 <= s < 1:  # also refuses NaN
            raise ValueError(f"sparsity must lie in [0, 1), the fraction of delta that is zero; got {s!r}")
        if s and sparsify == "dense":
            raise ValueError(f"sparsity must be 0 with sparsify='dense', which keeps every entry; got {s!r}")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"workspace_bytes must be a positive number of bytes or None; got {workspace_bytes!r}")
    return Plan(kernel, sparsify, groups, scope, tuple(float(s) for s in each), dropout, workspace_bytes or 0)


def check_layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    """Shapes and devices of one layer."""
    if weight is None and bias is not None:
        raise ValueError("bias must be None where weight is None: y is then the delta's part alone")
    if weight is not None and weight.shape != (b.shape[0], a.shape[0]):
        raise ValueError(
            f"weight must be [out, in] = [{b.shape[0]}, {a.shape[0]}] by b and a; got {tuple(weight.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point; got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != a.shape[0]:
        raise ValueError(f"x must be [..., in] with in = {a.shape[0]}; got shape {tuple(x.shape)}")
    if bias is not None and bias.shape != b.shape[:1]:
        raise ValueError(f"bias must be [out] = [{b.shape[0]}]; got shape {tuple(bias.shape)}")
    devices = {"x": x, "weight": x if weight is None else weight, "bias": x if bias is None else bias, "a": a}
    if len({t.device for t in devices.values()}) > 1:
        found = ", ".join(f"{name} on {t.device}" for name, t in devices.items())
        raise ValueError(f"all tensors must be on one device; got {found}")


def check_rank(rank: int, kernel: str) -> None:
    segments = kernels.find(kernel).SEGMENTS
    if rank < 1 or rank % segments:
        raise ValueError(f"rank must be a positive multiple of {segments} for kernel {kernel!r}; got {rank}")


def check_rate(name: str, rate: float) -> None:
    if not (0 <= rate < 1 and math.isfinite(rate)):
        raise ValueError(f"{name} must lie in [0, 1); got {rate!r}")


def check_choice(what: str, name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        near = difflib.get_close_matches(str(name), allowed, 1, 0.0) if allowed else []
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"{what} must be one of {', '.join(allowed) or 'none'}; got {name!r}{hint}")
