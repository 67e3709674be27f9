"""The casts that autocast of a device type would make, made of meta tensors, visible to autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

# Which ops autocast touches, the dispatcher knows. Most of them it casts to float32; these
# to the low precision,
LOWERED = {
    "cpu": "conv1d conv1d.padding conv2d conv2d.padding conv3d conv3d.padding bmm mm linalg_vecdot baddbmm addmm"
    " _addmm_activation addbmm linear _convolution.deprecated matmul conv_tbc mkldnn_rnn_layer conv_transpose1d"
    " conv_transpose2d.input conv_transpose3d.input prelu scaled_dot_product_attention _native_multi_head_attention",
    "cuda": "_convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input"
    " conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm"
    " bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell"
    " rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention cudnn_convolution"
    " cudnn_convolution_transpose",
}
# these to the widest dtype among their arguments,
PROMOTED = {
    "cpu": "stack cat index_copy",
    "cuda": "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add",
}
# and of these it asks for a float32 result,
WIDENED = {
    "cpu": "",
    "cuda": "prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm"
    " linalg_matrix_norm.str_ord sum sum.dim_IntList",
}
# which some can give by another overload only.
RENAMED: dict[str, dict[str, str]] = {
    "cpu": {},
    "cuda": {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"},
}

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Cache:
    """Casts of parameters that train are kept until autocast's outermost block ends."""

    def __init__(self) -> None:
        self._kept = WeakIdKeyDictionary()

    def cast(self, dtype: torch.dtype, value: Any) -> Any:
        """`value` with all tensors in it that autocast may cast in this dtype, the last one cast first, as torch's."""
        leaves, shape = tree_flatten(value)
        return tree_unflatten([self._to(dtype, leaf) for leaf in reversed(leaves)][::-1], shape)

    def lowered(self, value: Any) -> Any:
        """`cast` to the low precision, where autocast is on."""
        return self.cast(low(), value) if is_on() else value

    def _to(self, dtype: torch.dtype, x: Any) -> Any:
        if not eligible(x) or x.dtype == dtype:
            return x
        trains = x.requires_grad and x.is_leaf and not x._is_view()
        if not (trains and x.dtype == torch.float32 and dtype == low() and torch.is_autocast_cache_enabled()):
            return x.to(dtype)
        if x not in self._kept:
            self._kept[x] = x.to(dtype)
        return self._kept[x]

    @contextmanager
    def dropped_with_autocast(self) -> Iterator[Cache]:
        """Within, torch.autocast drops these casts when it drops its own, for which it calls a function of torch's."""
        original = torch.clear_autocast_cache

        def clear() -> None:
            original()
            self._kept.clear()

        torch.clear_autocast_cache = clear
        try:
            yield self
        finally:
            torch.clear_autocast_cache = original


def is_on() -> bool:
    """Whether autocast is, for meta tensors (`standing.autocast_type`)."""
    return torch.is_autocast_enabled("cpu")


def low() -> torch.dtype:
    return torch.get_autocast_dtype("cpu")


def eligible(x: Any) -> bool:
    """Whether autocast may cast it."""
    return isinstance(x, Tensor) and x.is_meta and x.is_floating_point() and x.dtype != torch.float64


def calls(device_type: str, kept: Cache) -> dict[str, Callable[..., Any]]:
    """What to call in place of each op that autocast of this device type touches, by name (`softmax.int`)."""
    policies: dict[str, Callable[..., Arguments]] = dict.fromkeys(_touched(device_type), _in_float32)
    for names, policy in ((LOWERED, _lowered), (PROMOTED, _promoted), (WIDENED, _widened)):
        policies |= dict.fromkeys(names[device_type].split(), policy)
    policies |= dict.fromkeys(RENAMED[device_type], _with_dtype)
    found: dict[str, Callable[..., Any]] = {}
    for name, policy in policies.items():
        op = overload(name)
        wide = overload(RENAMED[device_type].get(name, name))
        found[name] = partial(_call, kept, policy, op, wide)
    return found


@cache
def _touched(device_type: str) -> list[str]:
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device_type]
    return [
        name.removeprefix("aten::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::") and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    ]


def overload(name: str) -> OpOverload:
    """`softmax.int` of aten."""
    packet, _, which = name.partition(".")
    found: OpOverload = getattr(getattr(torch.ops.aten, packet), which or "default")
    return found


def _call(
    kept: Cache, policy: Callable[..., Arguments], op: OpOverload, wide: OpOverload, *args: Any, **options: Any
) -> Any:
    if is_on() and any(map(eligible, tree_leaves((args, options)))):
        args, options = policy(kept, wide, args, options)
        return wide(*args, **options)
    return op(*args, **options)


def _lowered(kept: Cache, op: OpOverload, *given: Any) -> Arguments:
    return kept.cast(low(), given)


def _in_float32(kept: Cache, op: OpOverload, *given: Any) -> Arguments:
    return kept.cast(torch.float32, given)


def _promoted(kept: Cache, op: OpOverload, *given: Any) -> Arguments:
    others = {leaf.dtype for leaf in filter(eligible, tree_leaves(given))} - {low()}
    return kept.cast(torch.float32 if others else low(), given)


def _widened(kept: Cache, op: OpOverload, args: tuple[Any, ...], options: dict[str, Any]) -> Arguments:
    """With dtype float32, unless one is asked for."""
    names = [argument.name for argument in op._schema.arguments]
    said = dict(zip(names, args, strict=False)) | options
    return (), {**said, "dtype": torch.float32 if said.get("dtype") is None else said["dtype"]}


def _with_dtype(kept: Cache, op: OpOverload, args: tuple[Any, ...], options: dict[str, Any]) -> Arguments:
    """Of an overload that has no defaults; keepdim is the last of its arguments."""
    args = (*args, *options.values())
    short = len([a for a in op._schema.arguments if not a.kwarg_only]) - len(args)
    return (*args, *[False] * short), {"dtype": torch.float32}
