"""What PEFT puts in the place of a linear layer, and of a parameter."""

from __future__ import annotations

import warnings
from collections.abc import Container
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from snell_dist import ops
from snell_dist.ops import kernels
from snell_dist.ops.snell import wide
from snell_dist.peft.config import Form, SnellConfig, drawn

PREFIX = "snell_"
SCALARS = sorted({name for kernel in ops.KERNELS for name in kernels.find(kernel).PARAMS})


class SnellLayer(BaseTunerLayer):
    """What an adapted layer and a trained parameter share. Factors stay float32 beside a half-precision base."""

    def __init__(self, adapter_name: str) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []

    @property
    def home(self) -> Tensor:
        """A tensor of the base."""
        raise NotImplementedError

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for name in self.adapter_layer_names:
            factors = getattr(self, name)
            if adapter_name in factors and not factors[adapter_name].is_meta:
                factors[adapter_name].data = factors[adapter_name].data.to(device or self.home.device)

    def _in_force(self, factors: Container[str]) -> list[str]:
        """Adapters of this layer that the forward pass adds."""
        if self.disable_adapters or self.merged:
            return []
        return [adapter for adapter in self.active_adapters if adapter in factors]


class SnellLinear(nn.Module, SnellLayer):
    """A linear layer with the deltas of the active adapters.

    One adapter computes with W0 + delta at once, as in the harness, where nothing else is to be done with the layer
    (hooks, shards, packed weights). More of them, and dropout, are products of their own.
    """

    adapter_layer_names = (f"{PREFIX}a", f"{PREFIX}b", *(f"{PREFIX}{name}" for name in SCALARS))
    other_param_names = ("forms",)
    snell_a: nn.ParameterDict
    snell_b: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        nn.Module.__init__(self)
        SnellLayer.__init__(self, adapter_name)
        self.base_layer = base_layer
        self.forms: dict[str, Form] = {}
        self._before: list[tuple[Tensor, Tensor]] = []  # of each merged adapter: which entries it changed, and those

    @property
    def home(self) -> Tensor:
        return self.get_base_layer().weight  # type: ignore[return-value]

    def update_layer(self, adapter_name: str, name: str, config: SnellConfig) -> None:
        """Adds an adapter."""
        self.forms[adapter_name] = form = config.form(name, self.get_base_layer())
        with drawn(config.seed, name):
            factors = form.factors()
        for key, factor in factors.items():
            getattr(self, PREFIX + key)[adapter_name] = nn.Parameter(factor)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] to [..., out]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self._in_force(self.forms)
        base = self.base_layer
        if adapters and is_plain(base) and self.forms[adapters[0]].whole:
            y = self._product(adapters.pop(0), x, base.weight, base.bias)
        else:
            y = base(x, *args, **kwargs)
        for adapter in adapters:
            y = self.forms[adapter].add(y, self._product(adapter, x, None, None))
        return y

    def _product(self, adapter: str, x: Tensor, weight: Any, bias: Any) -> Tensor:
        form = self.forms[adapter]
        return ops.snell_linear(
            x, weight, bias, **self._factors(adapter), **form.delta(),
            dropout=form.method.dropout, training=self.training, state=form.state,
        )  # fmt: skip

    def _factors(self, adapter: str) -> dict[str, Any]:
        scalars = {name: getattr(self, PREFIX + name) for name in SCALARS}
        return {
            "a": self.snell_a[adapter],
            "b": self.snell_b[adapter],
            "kernel_params": {name: those[adapter] for name, those in scalars.items() if adapter in those},
        }

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, in its layout ([in, out] for a Conv1D), float32. Raises ValueError
        where a factor is not finite."""
        form = self.forms[adapter]
        delta = ops.merge_delta(**self._factors(adapter), **form.delta())
        if not form.whole:
            delta = form.with_rows(delta.new_zeros(form.out_features, form.in_features), delta)
        return delta.t() if isinstance(self.get_base_layer(), Conv1D) else delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds deltas to the weight. `unmerge` brings back its very bits: the entries that change are kept.

        Raises ValueError where a factor is not finite (with or without `safe_merge`), or the weight is quantized.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.forms:
                continue
            weight = self.home.data
            if not weight.is_floating_point():
                raise ValueError(
                    f"Cannot merge into a weight of {weight.dtype}, which would round the delta away: load the base "
                    "model in full precision and merge there."
                )
            delta = self.get_delta_weight(adapter)
            changed = delta != 0
            self._before.append((changed, weight[changed]))
            weight.add_(delta)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """The weight as it was before any merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.merged_adapters.pop()
            changed, before = self._before.pop()
            weight = self.home.data
            weight[changed.to(weight.device)] = before.to(weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class SnellParameter(nn.Module, SnellLayer):
    """A parameter of the base that has a value of its own in each adapter; what several change adds up.

    It parametrizes the base's parameter, so that a module's forward finds the value where it always was. A merged
    adapter stays in force whichever is active; the base's own value is touched when the model is unloaded.
    """

    adapter_layer_names = (f"{PREFIX}value",)
    snell_value: nn.ParameterDict

    def __init__(self, adapter_name: str) -> None:
        nn.Module.__init__(self)
        SnellLayer.__init__(self, adapter_name)
        self._place: list[parametrize.ParametrizationList] = []  # in a list, for it is no child of this module

    @property
    def home(self) -> Tensor:
        return self._place[0].original

    weight = bias = property()  # PEFT looks for a base layer's; there is none

    def update_layer(self, adapter_name: str, device: str | None) -> None:
        """Adds an adapter, which starts at the base's value; `device` other than the base's: one without numbers."""
        value = wide(self.home.detach().clone())
        self.snell_value[adapter_name] = nn.Parameter(value.to(device or value.device))

    def forward(self, original: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self.merged_adapters or self._in_force(list(self.snell_value.keys()))
        values: list[Tensor] = [self.snell_value[adapter] for adapter in adapters]
        if not values:
            return original
        return sum((value - original for value in values[1:]), start=values[0]).to(original.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        found = check_adapters_to_merge(self, adapter_names)
        self.merged_adapters += [adapter for adapter in found if adapter in self.snell_value]

    def unmerge(self) -> None:
        self.merged_adapters.clear()


def is_plain(layer: nn.Module) -> bool:
    """Whether to call the layer is to multiply by its weight and nothing else, which the operator may then do."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__ or hooks:
        return False
    return type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()
