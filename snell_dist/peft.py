"""SNELL as a method of Hugging Face PEFT: importing this file makes PEFT know it, and all of PEFT then works with it.

    from peft import get_peft_model
    from snell_dist.peft import SnellConfig

    model = get_peft_model(model, SnellConfig(rank=8, sparsity=0.9, target_modules="all-linear"))

Saved are PEFT's two files. An adapted layer `fc1` has `fc1.snell_a` [in, groups * rank] and `fc1.snell_b` [rows, rank],
and the scalars of its kernel, `fc1.snell_alpha` [groups] and so on; a parameter of `parameters_to_save`, `cls_token`,
has `parametrizations.cls_token.0.snell_value`. A process that loads an adapter imports this file first.

PEFT's types are a closed enum that its registry insists on, so SNELL gets an enum of its own, equal to the string that
adapter_config.json has, and enters the mappings that PEFT exports.
"""

from __future__ import annotations

import enum
import hashlib
import re
import warnings
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from snell_dist import ops
from snell_dist.adapted import RowGroups
from snell_dist.anatomy import PARTS, find_blocks, select_names
from snell_dist.config import ConfigError, Plugin, check
from snell_dist.methods import check_rank
from snell_dist.methods._kernel import KernelMethod
from snell_dist.ops import kernels
from snell_dist.ops.snell import wide

try:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.tuners.tuners_utils import (
        BaseTuner,
        BaseTunerLayer,
        _maybe_include_all_linear_layers,
        check_adapters_to_merge,
    )
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, AuxiliaryTrainingWrapper
    from peft.utils.other import get_pattern_key
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(f"snell_dist.peft needs PEFT ({error}): pip install 'snell_dist[peft]'") from error

T = TypeVar("T")
PREFIX = "snell_"
FUSED = {name: len(parts) for name, parts in PARTS.items() if len(parts) > 1} | {"c_attn": 3}  # c_attn: GPT-2's
SCALARS = sorted({name for kernel in ops.KERNELS for name in kernels.find(kernel).PARAMS})
SAMPLES = 64  # entries of a weight that its fingerprint looks at


class SnellType(str, enum.Enum):
    """What PEFT's own enum of types would say."""

    SNELL = "SNELL"


@dataclass
class SnellConfig(PeftConfig):
    """Settings of a SNELL adapter. ValueError, in one line, for those that do not fit.

    Names of layers in `target_modules`, `exclude_modules`, `modules_to_save` and the patterns are matched as PEFT does:
    a list by the ends of names, a text as a regular expression of the whole name.
    """

    rank: int = field(
        default=8, metadata={"help": "Columns of each factor; even for the distance kernels, which have two halves."}
    )
    sparsity: float = field(default=0.9, metadata={"help": "Fraction of each delta that is zero, in [0, 1)."})
    kernel: Literal["distance", "linear", "sigmoid", "rbf", "snella"] = field(
        default="distance", metadata={"help": "How the factors become a matrix (table A6 of the paper; SNELLA's)."}
    )
    sparsify: Literal["released", "paper", "hard", "dense"] = field(
        default="released",
        metadata={"help": "What survivors become: w|w|, equation 5's, or w; dense: MixK, for kernel='snella' alone."},
    )
    dropout: float = field(default=0.0, metadata={"help": "On the delta's input (the paper's code: 0.1)."})
    target_modules: list[str] | str | None = field(
        default="all-linear",
        metadata={"help": "Linear layers to adapt: names, a regular expression, or 'all-linear' but the output layer."},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers that are left alone."})
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks to adapt, where target_modules is a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList that layers_to_transform numbers."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained whole and saved, such as a new classifier."}
    )
    parameters_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Parameters (globs) that are trained and saved, such as 'cls_token' or '*.norm1.bias'."},
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Ranks of other layers than most."})
    sparsity_pattern: dict[str, float | list[float]] = field(
        default_factory=dict, metadata={"help": "Sparsities of other layers than most; one, or one for each row group."}
    )
    groups: dict[str, int] = field(
        default_factory=lambda: dict(FUSED),
        metadata={"help": "Equal row groups of fused layers, each adapted as a matrix of its own."},
    )
    adapted_groups: dict[str, Sequence[int]] = field(
        default_factory=dict, metadata={"help": "Which row groups of a fused layer are adapted; all, where not said."}
    )
    seed: int | None = field(
        default=None, metadata={"help": "Draws the factors from this number and the layer's name, not torch's state."}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "Of the weights that the adapter belongs to; written when it is made."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SnellType.SNELL
        self._expected = self.base_fingerprint  # said by a file, and not found by an earlier use of this object
        for name in ("target_modules", "exclude_modules"):
            said = getattr(self, name)
            setattr(self, name, set(said) if isinstance(said, list) else said)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"`seed` must be an integer or None; got {self.seed!r}.")
        if isinstance(self.parameters_to_save, str):
            self.parameters_to_save = [self.parameters_to_save]
        for rank in (self.rank, *self.rank_pattern.values()):
            self.method(rank, self.sparsity)
        for sparsity in self.sparsity_pattern.values():
            self.method(self.rank, sparsity)
        for pattern, count in self.groups.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"`groups` must be positive integers; got {count!r} for {pattern!r}.")

    def method(self, rank: int, sparsity: float | list[float]) -> KernelMethod:
        """The method of the harness that a layer follows, checked by its rules. ValueError where it does not fit."""
        name = "snell" if self.kernel != "snella" else "mixk" if self.sparsify == "dense" else "snella"
        settings: dict[str, Any] = {"name": name, "rank": rank, "kernel": self.kernel, "dropout": self.dropout}
        if name != "mixk":
            settings["sparsify"] = self.sparsify
        for one in sparsity if isinstance(sparsity, list) else [sparsity]:
            with said_as_peft():
                method = check(
                    settings if name == "mixk" else settings | {"sparsity": one}, Plugin("methods").find(name)
                )
        assert isinstance(method, KernelMethod)
        return method

    def form(self, name: str, layer: nn.Module) -> Form:
        """How the layer of this name is to be adapted. ValueError where it cannot be."""
        in_features, out_features = features(name, layer)
        parts = by_name(self.groups, name, 1)
        adapted = list(by_name(self.adapted_groups, name, range(parts)))
        if out_features % parts:
            raise ValueError(
                f"`groups`: the {out_features} rows of {name} are not {parts} equal groups; "
                f"say groups={{{name!r}: 1}}, or another number that divides them."
            )
        if not adapted or adapted != sorted(set(adapted) & set(range(parts))):
            raise ValueError(
                f"`adapted_groups` must be rising numbers below {parts}, the number of {name}'s groups; got {adapted}."
            )
        sparsity = by_name(self.sparsity_pattern, name, self.sparsity)
        if isinstance(sparsity, list) and len(sparsity) != len(adapted):
            raise ValueError(
                f"`sparsity_pattern` must be one number or {len(adapted)} for {name}, one a row group; got {sparsity}."
            )
        method = self.method(by_name(self.rank_pattern, name, self.rank), sparsity)
        with said_as_peft(f"; {name} is one: name it in `rank_pattern`, `exclude_modules` or `modules_to_save`"):
            check_rank(method.rank, in_features, out_features // parts)
        return Form(parts, tuple(adapted), method, sparsity, in_features, out_features)

    @property
    def expected_fingerprint(self) -> str | None:
        """What the base must be, where a file says so."""
        return self.base_fingerprint if self.base_fingerprint == self._expected else None


@dataclass(frozen=True)
class Form(RowGroups):
    """How one adapter adapts one layer [out, in], and what it remembers to save work."""

    parts: int
    adapted: tuple[int, ...]
    method: KernelMethod
    sparsity: float | list[float]
    in_features: int
    out_features: int
    state: ops.ThresholdState = field(default_factory=ops.ThresholdState)

    def factors(self) -> dict[str, Tensor]:
        """Initial factors by name: a [in, groups * rank], b [groups * out / parts, rank], scalars [groups]."""
        rows = self.out_features // self.parts * self.groups
        return self.method.factors(nn.Linear(self.in_features, rows, bias=False, device="meta"), self.groups)

    def delta(self) -> dict[str, Any]:
        """The operator's arguments besides the factors."""
        sparsify = getattr(self.method, "sparsify", "dense")
        sparsity = 0.0 if sparsify == "dense" else self.sparsity
        return {"sparsity": sparsity, "sparsify": sparsify, "kernel": self.method.kernel, "groups": self.groups}


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


def by_name(patterns: Mapping[str, T], name: str, default: T) -> T:
    """The value of the first pattern that matches, as PEFT matches in `rank_pattern`."""
    return patterns.get(get_pattern_key(list(patterns), name), default)


def features(name: str, layer: nn.Module) -> tuple[int, int]:
    """Columns and rows of a layer's matrix. ValueError where it is no linear layer."""
    if isinstance(layer, Conv1D):
        columns, rows = layer.weight.shape
        return columns, rows
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    raise ValueError(
        f"Target module {name} is a {type(layer).__name__}. Currently, only `torch.nn.Linear` (also quantized by "
        "bitsandbytes) and `transformers.pytorch_utils.Conv1D` are supported."
    )


def is_plain(layer: nn.Module) -> bool:
    """Whether to call the layer is to multiply by its weight and nothing else, which the operator may then do."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__ or hooks:
        return False
    return type(layer.weight) is nn.Parameter and layer.weight.is_floating_point()


@contextmanager
def said_as_peft(more: str = "") -> Iterator[None]:
    """The harness's complaints as PEFT says them: one ValueError, one line."""
    try:
        yield
    except ConfigError as error:
        said = [f"`{p.key.removeprefix('method.')}` = {p.value!r}: {p.message}" for p in error.problems]
        raise ValueError("; ".join(said) + more) from None


@contextmanager
def drawn(seed: int | None, name: str) -> Iterator[None]:
    """Random numbers that the seed and the layer's name decide."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed + zlib.crc32(name.encode()))
        yield


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


def fingerprint(layers: Mapping[str, nn.Module]) -> str:
    """What tells the weights of these layers from others: a hash of names and shapes, and one of sampled entries.

    It sees another architecture, other pretrained weights, or weights that were trained or merged since: 64 entries a
    layer are read, so a change of a few entries may stay unseen, as does one of other layers. Entries count in
    bfloat16, so that a base agrees with itself in float32 and bfloat16; float16, packed, sharded and meta ones do not.
    """
    shapes, entries = hashlib.sha256(), hashlib.sha256()
    countable = True
    for name, layer in sorted(layers.items()):
        shapes.update(f"{name} {features(name, layer)}".encode())
        weight = layer.weight
        assert isinstance(weight, Tensor)
        countable &= type(weight) in (nn.Parameter, Tensor) and not weight.is_meta and weight.numel() > 0
        countable &= weight.dtype in (torch.float32, torch.float64, torch.bfloat16)
        if countable:
            places = (
                torch.arange(SAMPLES, device=weight.device) * 2654435761 % weight.numel()
            )  # spread by Knuth's factor
            sample = weight.detach().take(places).float().bfloat16()
            entries.update(bytes(sample.view(torch.uint8).tolist()))
    return f"{shapes.hexdigest()[:16]}-{entries.hexdigest()[:16] if countable else ''}"


def difference(one: str, two: str) -> str:
    """In what two fingerprints differ; nothing where they agree as far as both say."""
    (shapes, entries), (their_shapes, theirs) = one.split("-", 1), two.split("-", 1)
    if shapes != their_shapes:
        return "names or shapes"
    return "weights" if entries and theirs and entries != theirs else ""


PEFT_TYPE_TO_CONFIG_MAPPING[SnellType.SNELL] = SnellConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[SnellType.SNELL] = SnellModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[SnellType.SNELL] = PREFIX  # type: ignore[index]
