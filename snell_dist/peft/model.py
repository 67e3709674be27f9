"""PEFT's tuner for SNELL."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snell_dist.anatomy import find_blocks, select_names
from snell_dist.peft.base import difference, fingerprint
from snell_dist.peft.config import SnellConfig, said_as_peft
from snell_dist.peft.layers import PREFIX, SnellLayer, SnellLinear, SnellParameter


class SnellModel(BaseTuner):
    """PEFT's tuner for SNELL: what `get_peft_model` puts around a model, and `inject_adapter_in_model` uses."""

    prefix = PREFIX
    tuner_layer_cls = SnellLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False, state_dict: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """PEFT's, after a look at all that is asked: a ValueError leaves the model as it was."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, SnellConfig)
        self._prepare_adapter_config(config, self.get_model_config(model))
        _maybe_include_all_linear_layers(config, model)
        names = self._parameters_to_save(config, model)
        if state_dict is None:
            self._check_targets(config, model, adapter_name)
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )  # fmt: skip
        places = own_parameters(model)
        for name in names:
            layer = parametrized(*places[name], adapter_name)
            layer.update_layer(adapter_name, "meta" if low_cpu_mem_usage else None)
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _targets(self, config: SnellConfig, model: nn.Module) -> dict[str, nn.Module]:
        """Base layers by name."""
        adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        return {
            name: module.get_base_layer() if isinstance(module, SnellLinear) else module
            for name, module in model.named_modules()
            if name and not name.startswith(adapted) and self._check_target_module_exists(config, name)
        }

    def _check_targets(self, config: SnellConfig, model: nn.Module, adapter_name: str) -> None:
        targets = self._targets(config, model)
        for name, layer in targets.items():
            parent = model.get_submodule(name.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                raise ValueError(
                    f"{name}: nn.MultiheadAttention computes with this layer's weight itself, past any adapter; name "
                    "it in `exclude_modules`."
                )
            config.form(name, layer)
        if any(isinstance(module, SnellLayer) and module.merged for module in model.modules()):
            warnings.warn("Adapters cannot be added while some are merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        found, expected = fingerprint(targets), config.expected_fingerprint
        if expected is not None and (differs := difference(expected, found)):
            base = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
            raise ValueError(
                f"Adapter {adapter_name!r} belongs to another base model{base}: {differs} of the adapted layers differ "
                f"({expected} there, {found} here). Load that base; to go on with this one, pass a config whose "
                "`base_fingerprint` is set to None."
            )
        config.base_fingerprint = found

    def _parameters_to_save(self, config: SnellConfig, model: nn.Module) -> list[str]:
        taken = self._targets(config, model)
        saved = re.compile("|".join(rf"((^|.*\.){name}\..*)" for name in config.modules_to_save or ()) or "(?!)")
        names = [n for n in own_parameters(model) if n.removesuffix(".weight") not in taken and not saved.match(n)]
        with said_as_peft():
            return select_names(names, config.parameters_to_save or (), find_blocks(model), "parameters_to_save")

    def _create_and_replace(
        self, peft_config: PeftConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None, **rest: Any,
    ) -> None:  # fmt: skip
        assert isinstance(peft_config, SnellConfig)
        layer = target if isinstance(target, SnellLinear) else SnellLinear(target, adapter_name)
        layer.update_layer(adapter_name, current_key, peft_config)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's; a ValueError where there is nothing to merge any more."""
        asked = adapter_names or self.active_adapters
        merged = {name for module in self._layers() for name in module.merged_adapters}
        if asked and merged.issuperset(asked):
            raise ValueError(f"Adapters {asked} are merged already; call `unmerge_adapter()` to undo it.")
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # fmt: skip
        if not self._layers():
            raise ValueError("The model has no SNELL layers: it was merged or unloaded already.")
        for module in list(self.model.modules()):
            for name, layer in parametrizations(module):
                if merge:
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                parametrize.remove_parametrizations(module, name, leave_parametrized=merge)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT asks before each forward pass."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "SNELL adapters cannot be mixed in one batch; leave `adapter_names` out, and set_adapter()."
            )
        yield

    def __getattr__(self, name: str) -> Any:
        """PEFT's, which passes on to the model; not how a parametrized one is copied, or a copy would be that alone."""
        if name.startswith("__"):
            raise AttributeError(name)
        return super().__getattr__(name)

    def _layers(self) -> list[SnellLayer]:
        return [module for module in self.model.modules() if isinstance(module, SnellLayer)]


def own_parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where each parameter of the base model is: a module and the name in it, by the name that it has without PEFT."""
    wrapped = tuple(f"{n}." for n, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in model.named_modules():
        if re.search(rf"(^|\.)(parametrizations|{PREFIX}\w+)(\.|$)", path) or f"{path}.".startswith(wrapped):
            continue
        home = path.replace(".base_layer", "") + "." if path else ""
        leaves = [*module._parameters, *(name for name, _ in parametrizations(module))]
        values = {leaf: getattr(module, leaf) for leaf in leaves}
        found |= {home + leaf: (module, leaf) for leaf, v in values.items() if v is not None and v.is_floating_point()}
    return found


def parametrizations(module: nn.Module) -> list[tuple[str, SnellParameter]]:
    """The module's own parameters that adapters have values of."""
    if not parametrize.is_parametrized(module):
        return []
    places = module.get_submodule("parametrizations").named_children()
    return [(name, layer) for name, place in places for layer in place.children() if isinstance(layer, SnellParameter)]


def parametrized(module: nn.Module, name: str, adapter_name: str) -> SnellParameter:
    """What holds the adapters' values of a parameter; made where it is not there yet."""
    for known, layer in parametrizations(module):
        if known == name:
            return layer
    original, layer = module._parameters[name], SnellParameter(adapter_name)
    parametrize.register_parametrization(module, name, layer)
    place = module.get_submodule(f"parametrizations.{name}")
    assert isinstance(place, parametrize.ParametrizationList)
    place._parameters["original"] = original  # the very one: under low_cpu_mem_usage new parameters have no data
    layer._place.append(place)
    return layer
