"""A PEFT adapter as one of our runs has it: its method as a config section, and its tensors by our names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snell_dist.adapted import AdaptedLinear
from snell_dist.anatomy import Backbone
from snell_dist.config import Plugin, UserError, check
from snell_dist.formats import _peft_names, _separate, _transformers
from snell_dist.methods import Method, adapted_layers
from snell_dist.packed import plain
from snell_dist.peft import SnellConfig
from snell_dist.peft.base import difference, fingerprint
from snell_dist.run_config import Run


@dataclass(frozen=True)
class Adopted:
    """`names`: where the adapter is of Transformers' model, what it calls ours; its layers and their fingerprint."""

    method: Method
    tensors: Mapping[str, Tensor]
    names: _separate.Names | None
    homes: list[str]  # the adapter's own layers
    fingerprint: str | None

    def check_base(self, folder: Path, model: nn.Module) -> None:
        """UserError where the base of an adapted model of ours is not what the adapter was trained on."""
        if self.fingerprint is None:
            return
        layers: dict[str, nn.Module] = {}
        for name, layer in adapted_layers(model):
            if self.names is None:
                layers[name] = plain(layer.dense, None)
            else:
                parts = self.names.layers(name, layer.dense)
                layers |= {home: plain(part, None) for home, part in parts.items() if home in self.homes}
        found = fingerprint(layers)
        if differs := difference(self.fingerprint, found):
            raise UserError(
                f"{folder}: was trained on another base: {differs} of the adapted layers differ"
                f" ({self.fingerprint} there, {found} here); backbone.weights decides"
            )


def read(folder: Path, config: Run, classes: int) -> Adopted:
    """An adapter folder of PEFT, for the model of a configuration. UserError where they do not belong together."""
    said, state = _peft_names.read(folder)
    section = config.backbone.model_copy(update={"weights": None, "head": "new"})
    with torch.device("meta"):
        ours = config.task.build(section, [str(i) for i in range(classes)])
    fingerprint = said.base_fingerprint if isinstance(said, SnellConfig) else None
    homes = _homes(state)
    if not homes:
        raise UserError(f"{folder}: has no factors of SNELL or LoRA")
    known = dict(ours.model.named_modules())
    if all(home in known for home in homes):
        tensors = _peft_names.from_peft(said, state, ours.model)
        return Adopted(
            _method(folder, ours, dict(adapted_layers(ours.model)), tensors), tensors, None, homes, fingerprint
        )
    names, theirs = _transformers_names(folder, homes, ours, config, classes)
    separate = _peft_names.from_peft(said, state, theirs)
    try:
        layers, tensors = _separate.fused(names, ours, dict(adapted_layers(theirs)), separate)
    except KeyError as error:
        raise UserError(f"{folder}: {error.args[0]}: is no tensor of this model, or lacks its fellows") from None
    return Adopted(_method(folder, ours, layers, tensors), tensors, names, homes, fingerprint)


def _homes(state: Mapping[str, Tensor]) -> list[str]:
    endings = ".snell_a", ".lora_A.weight"
    return sorted(
        name.removeprefix(_peft_names.HOME).removesuffix(end) for name in state for end in endings if name.endswith(end)
    )


def _transformers_names(
    folder: Path, homes: list[str], ours: Backbone, config: Run, classes: int
) -> tuple[_separate.Names, Any]:
    """What Transformers' counterpart of our model calls its layers, and that model, without numbers."""
    counterpart = _transformers.counterpart(ours, config.backbone, [str(i) for i in range(classes)])
    with torch.device("meta"):
        theirs = getattr(_transformers.library(), counterpart.name)(counterpart.config)
    unknown = [[h for h in homes if h not in dict(model.named_modules())] for model in (ours.model, theirs)]
    if all(unknown):
        raise UserError(
            f"{folder}: adapts {min(unknown, key=len)[0]}, which neither {ours.name} nor Transformers'"
            f" {counterpart.name} has: backbone.name and backbone.size decide"
        )
    return _separate.Names(config.backbone, counterpart, theirs), theirs


def _method(folder: Path, ours: Backbone, layers: Mapping[str, AdaptedLinear], tensors: Mapping[str, Tensor]) -> Method:
    """One section for all layers. UserError where they differ."""
    first: Any = next(iter(layers.values())).method
    said = first.model_dump()
    for name, layer in layers.items():
        other: Any = layer.method
        different = [key for key, value in other.model_dump().items() if said[key] != value]
        if different:
            raise UserError(f"{folder}: {name} has a {different[0]} of its own, and a run has one for all layers")
    targets = []
    for target in ours.targets:
        if target.layer in layers:
            parent, adapted = target.layer.rpartition(".")[0], layers[target.layer].adapted
            parts = [target.parts[i] for i in adapted]
            whole = len(parts) == len(target.parts)
            targets += [target.layer] if whole else [f"{parent}.{part}" for part in parts]
    own = {f"{name}.{key}" for name, layer in layers.items() for key in (*layer.factor_names, *layer.buffer_names)}
    besides = [name for name in tensors if name not in own]
    settings = said | {"targets": targets, "also_train": besides}
    return check(settings, Plugin("methods").find(first.name))  # type: ignore[return-value]
