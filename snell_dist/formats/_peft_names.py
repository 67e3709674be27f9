"""Our adapted layers as adapters of Hugging Face PEFT, and back: names, shapes and settings.

    blocks.0.attn.qkv.a [in, groups * rank]   <->  base_model.model.blocks.0.attn.qkv.snell_a, the very tensor
    SNELL, SNELLA, MixK                       <->  SnellConfig (snell_dist/peft), as they are
    LoRA of q, k, v, each with its a and b     ->  one LoRA of qkv: lora_A has the a's rows one above the other,
                                                   [groups * rank, in], lora_B is block-diagonal, [out, groups * rank]

What trains besides is a module to save where all of the module trains, and else a parameter to save, which PEFT's LoRA
lacks. An adapter computes the same either way. PEFT has no place for dropout in some layers alone (it then drops in
all) and for SNELLA's averages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from snell_dist.adapted import AdaptedLinear
from snell_dist.config import UserError, check
from snell_dist.methods import adapted_layers
from snell_dist.methods._kernel import KernelMethod
from snell_dist.methods.lora import Lora
from snell_dist.methods.snella import Snella
from snell_dist.peft import SnellConfig
from snell_dist.peft.base import fingerprint
from snell_dist.peft.config import FUSED, by_name
from snell_dist.peft.layers import PREFIX, SCALARS
from snell_dist.tensor_files import FOR_TORCH, read_tensors, write_tensors

T = TypeVar("T")
HOME = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
VALUE = re.compile(rf"(.*?)parametrizations\.(\w+)\.0\.{PREFIX}value")
# Settings of LoRA in PEFT that make its function, or its base, another one than LoRA's.
FOREIGN = ("bias", "trainable_token_indices", "target_parameters", "layer_replication", "alora_invocation_tokens")


def to_peft(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The adapter of an adapted model, whose trained and remembered tensors come by name; the model itself gives names,
    settings and, where it is not on the meta device, the fingerprint of its base.

    Raises UserError where PEFT has no place for what the method trains.
    """
    layers = dict(adapted_layers(model))
    kinds = {type(layer.method) for layer in layers.values()}
    config: Any
    if kinds and all(issubclass(kind, KernelMethod) for kind in kinds):
        config, state = _snell(layers, tensors)
    elif kinds == {Lora}:
        config, state = _lora(layers, tensors)
    else:
        names = ", ".join(sorted({layer.method.name for layer in layers.values()})) or "what adds no factors"
        raise UserError(
            f"--format peft: PEFT has no method that is {names}; snell, snella, mixk and lora can be written"
        )
    config.exclude_modules = _also_matched(config, model, layers) or None
    _besides(config, state, model, layers, tensors)
    return config, state


def from_peft(config: PeftConfig, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapts a plain model in place as PEFT would, with our layers, and gives what trains by our names, filled in.

    Raises UserError for an adapter of another kind than SNELL and LoRA, or of another model.
    """
    state = dict(state)
    found = {name: layer for name, layer in model.named_modules() if name and check_target_module_exists(config, name)}
    values: dict[str, Tensor] = {}
    for name, linear in found.items():
        layer, own = _layer(config, state, name, linear)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        values |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    for key, tensor in state.items():
        path = key.removeprefix(HOME)
        value = VALUE.fullmatch(path)
        values["".join(value.groups()) if value else path] = tensor
    places = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in values.items():
            if name not in places:
                raise UserError(f"the adapter has {name}, which is no tensor of the model: is it another model's?")
            if places[name].shape != tensor.shape:
                shapes = f"{list(tensor.shape)}, and the model {list(places[name].shape)}"
                raise UserError(f"the adapter has {name} {shapes}: another model, or another number of classes?")
            places[name].copy_(tensor)
    return values


def write(folder: Path, config: PeftConfig, state: Mapping[str, Tensor]) -> None:
    """PEFT's two files."""
    config.inference_mode = True
    config.save_pretrained(str(folder))
    write_tensors(folder / WEIGHTS, state, FOR_TORCH)


def read(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """An adapter folder. UserError where it is none."""
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter of PEFT, which has adapter_config.json and {WEIGHTS}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'adapter_config.json'}: {error}") from None
    return config, read_tensors(folder / WEIGHTS)


def _snell(layers: dict[str, AdaptedLinear], tensors: Mapping[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    state: dict[str, Tensor] = {}
    sparsities = {}
    for name, layer in layers.items():
        state |= {f"{HOME}{name}.{PREFIX}{key}": tensors[f"{name}.{key}"] for key in layer.factor_names}
        sparsities[name] = _sparsity(layer, tensors.get(f"{name}.kept"))
    methods: list[Any] = [layer.method for layer in layers.values()]
    first = methods[0]
    rank, sparsity = first.rank, sparsities[next(iter(layers))]
    usual = sparsity if isinstance(sparsity, float) else 0.0
    config = SnellConfig(
        rank=rank, sparsity=usual, kernel=first.kernel, sparsify=getattr(first, "sparsify", "dense"),
        dropout=max(method.dropout for method in methods), target_modules=sorted(layers),
        rank_pattern=_patterns({name: method.rank for name, method in zip(layers, methods, strict=True)}, rank),
        sparsity_pattern=_patterns(sparsities, usual),
        adapted_groups=_patterns(
            {name: None if layer.whole else list(layer.adapted) for name, layer in layers.items()}, None
        ),
        base_fingerprint=fingerprint(layers),
    )  # fmt: skip
    if any(by_name(FUSED, name, 1) != layer.parts for name, layer in layers.items()):
        config.groups = _patterns({name: layer.parts for name, layer in layers.items()}, 1)
    return config, state


def _sparsity(layer: AdaptedLinear, kept: Tensor | None) -> float | list[float]:
    method: Any = layer.method
    if kept is not None:
        return [method.sparsity_at(layer, count) for count in kept.tolist()]
    return getattr(method, "sparsity", 0.0)


def _lora(layers: dict[str, AdaptedLinear], tensors: Mapping[str, Tensor]) -> tuple[PeftConfig, dict[str, Tensor]]:
    state, ranks, alphas, methods = {}, {}, {}, []
    for name, layer in layers.items():
        method = layer.method
        assert isinstance(method, Lora)
        a = tensors[f"{name}.a"].unflatten(1, (layer.groups, method.rank))  # [in, groups, rank]
        blocks = torch.block_diag(*tensors[f"{name}.b"].chunk(layer.groups))  # [groups * out / parts, groups * rank]
        whole = blocks.new_zeros(layer.out_features, blocks.shape[1])
        state[f"{HOME}{name}.lora_A.weight"] = a.flatten(1).t()
        state[f"{HOME}{name}.lora_B.weight"] = layer.with_rows(whole, blocks)
        if method.dora:
            if not layer.whole:
                raise UserError(f"--format peft: {name}: DoRA of some rows alone has no place in PEFT")
            state[f"{HOME}{name}.lora_magnitude_vector"] = tensors[f"{name}.m"].flatten()
        ranks[name] = layer.groups * method.rank
        alpha = method.rank if method.alpha is None else method.alpha
        alphas[name] = alpha * (layer.groups if method.scaling == "standard" else math.sqrt(layer.groups))
        methods.append(method)
    first = methods[0]
    usual = first.rank if first.alpha is None else first.alpha
    config = LoraConfig(
        r=first.rank, lora_alpha=usual,  # type: ignore[arg-type]
        target_modules=sorted(layers), lora_dropout=max(method.dropout for method in methods), use_dora=first.dora,
        use_rslora=first.scaling == "rslora", rank_pattern=_patterns(ranks, first.rank),
        alpha_pattern=_patterns(alphas, usual),
    )  # fmt: skip
    return config, state


def _layer(
    config: PeftConfig, state: dict[str, Tensor], name: str, linear: nn.Module
) -> tuple[AdaptedLinear, dict[str, Tensor]]:
    """An adapted layer and its tensors, which are taken out of the state."""
    if not isinstance(linear, nn.Linear):
        raise UserError(f"{name} is a {type(linear).__name__}; only nn.Linear can be adapted here")
    try:
        if isinstance(config, SnellConfig):
            return _snell_layer(config, state, name, linear)
        if isinstance(config, LoraConfig):
            return _lora_layer(config, state, name, linear)
    except KeyError as error:
        raise UserError(f"the adapter lacks {error.args[0]}: is it another model's?") from None
    raise UserError(f"the adapter is of PEFT's {config.peft_type}; SNELL and LORA can be read")


def _snell_layer(
    config: SnellConfig, state: dict[str, Tensor], name: str, linear: nn.Linear
) -> tuple[AdaptedLinear, dict[str, Tensor]]:
    form = config.form(name, linear)
    method, each = form.method, form.sparsity
    if isinstance(each, list):
        if not isinstance(method, Snella):
            raise UserError(f"sparsity_pattern: {name}: a sparsity for each row group is SNELLA's alone")
        allocator = {"target_sparsity": max(each)}
        method = check(method.model_dump() | {"allocator": allocator}, Snella)
    layer = AdaptedLinear(linear, method, form.parts, form.adapted)
    own = {key: state.pop(f"{HOME}{name}.{PREFIX}{key}") for key in ("a", "b", *SCALARS) if key in layer.factor_names}
    if isinstance(each, list):
        size = linear.in_features * linear.out_features // form.parts
        own["kept"] = torch.tensor([round((1 - sparsity) * size) for sparsity in each])
    return layer, own


def _lora_layer(
    config: LoraConfig, state: dict[str, Tensor], name: str, linear: nn.Linear
) -> tuple[AdaptedLinear, dict[str, Tensor]]:
    foreign = [key for key in FOREIGN if getattr(config, key, None) not in (None, "none", [])]
    if foreign:
        raise UserError(f"the adapter's {', '.join(foreign)} make it more than LoRA's factors, which alone can be read")
    alpha = by_name(config.alpha_pattern or {}, name, config.lora_alpha)
    one, two = (state.pop(f"{HOME}{name}.lora_{which}.weight") for which in "AB")
    scaling = "rslora" if config.use_rslora else "standard"
    said = {
        "name": "lora", "rank": len(one), "alpha": float(alpha), "scaling": scaling, "dora": config.use_dora,
        "dropout": config.lora_dropout,
    }  # fmt: skip
    own = {"a": one.t(), "b": two}
    if config.use_dora:
        own["m"] = state.pop(f"{HOME}{name}.lora_magnitude_vector").unsqueeze(1)
    return AdaptedLinear(linear, check(said, Lora)), own


def _patterns(values: Mapping[str, T], usual: T) -> dict[str, Any]:
    """The values that are not the usual one, by the last part of a name where that decides, else by whole names."""
    by_leaf: dict[str, set[str]] = {}
    for name, value in values.items():
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(repr(value))
    if all(len(each) == 1 for each in by_leaf.values()):
        values = {name.rpartition(".")[2]: value for name, value in values.items()}
    longest_first = sorted(values, key=lambda name: -len(name))  # a name also stands for those that end with it
    return {re.escape(name): values[name] for name in longest_first if values[name] != usual}


def _also_matched(config: Any, model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Modules that PEFT would take for one of the layers, since their names end alike."""
    names = [name for name, _ in model.named_modules() if name]
    return [name for name in names if name not in layers and check_target_module_exists(config, name)]


def _besides(
    config: Any, state: dict[str, Tensor], model: nn.Module, layers: Mapping[str, AdaptedLinear],
    tensors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Adds what trains besides factors."""
    own = {f"{name}.{key}" for name, layer in layers.items() for key in (*layer.factor_names, *layer.buffer_names)}
    rest = [name for name in tensors if name not in own]
    homes = [name.rpartition(".")[0] for name in rest]
    modules = [name for name, module in model.named_modules() if any(True for _ in module.parameters())]
    whole: list[str] = []
    single: list[str] = []
    for home in dict.fromkeys(homes):
        inside = {f"{home}.{leaf}".removeprefix(".") for leaf, _ in model.get_submodule(home).named_parameters()}
        alone = not any(name != home and name.endswith(home) for name in modules)  # PEFT looks at the ends of names
        (whole if home and alone and inside <= {*rest} else single).append(home)
    config.modules_to_save = whole or None
    for name, home in zip(rest, homes, strict=True):
        leaf = name.rpartition(".")[2]
        if home in whole:
            state[HOME + name] = tensors[name]
        else:
            state[f"{HOME}{home}.parametrizations.{leaf}.0.{PREFIX}value".replace("..", ".")] = tensors[name]
    loose = [name for name, home in zip(rest, homes, strict=True) if home in single]
    if loose and not isinstance(config, SnellConfig):
        raise UserError(
            f"--format peft: {loose[0]} trains, for which LoRA in PEFT has no place; method.also_train decides"
        )
    if loose:
        config.parameters_to_save = loose
