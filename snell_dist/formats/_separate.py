"""Our fused layers as Transformers' separate ones, and back: each row group of a layer is a matrix of its own there.

blocks.0.attn.qkv, a [in, 3 rank]    <->    vit.encoder.layer.0.attention.attention.query, .key, .value, a [in, rank]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from snell_dist.adapted import AdaptedLinear
from snell_dist.anatomy import Backbone
from snell_dist.backbones import BackboneSection
from snell_dist.formats._transformers import Counterpart
from snell_dist.methods import adapted_layers
from snell_dist.packed import plain


class Names:
    """What Transformers' model calls the parameters of ours. It has the names of published files, but for those that it
    changes as it loads them.
    """

    def __init__(self, section: BackboneSection, theirs: Counterpart, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._section, self._theirs = section, theirs
        changes = get_model_conversion_mapping(model)
        self._renamings = [each for each in changes if isinstance(each, WeightRenaming)]
        self._converters = [each for each in changes if isinstance(each, WeightConverter)]
        self._prefix, self._state = model.base_model_prefix, model.state_dict()

    def published(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """A tensor of ours under their names, in parts where they are separate."""
        parts = self._theirs.publish(self._section.library_name(name), tensor)
        return [(self._installed(each), part) for each, part in parts]

    def _installed(self, name: str) -> str:
        from transformers.core_model_loading import rename_source_key

        return rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)[0]

    def layers(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Their layers that are the row groups of one of ours, in order, and their weights."""
        return {each.removesuffix(".weight"): part for each, part in self.published(f"{name}.weight", weight)}


def separated(names: Names, model: nn.Module, ours: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adapts Transformers' model in place as ours is, and gives what trains and is remembered by its names."""
    found: dict[str, Tensor] = {}
    taken: set[str] = set()
    for name, layer in adapted_layers(ours):
        homes = list(names.layers(name, torch.empty(layer.out_features, layer.in_features, device="meta")))
        own = (*layer.factor_names, *layer.buffer_names)
        taken |= {f"{name}.{key}" for key in own}
        for place, part in enumerate(layer.adapted):
            parent, _, leaf = homes[part].rpartition(".")
            linear = model.get_submodule(homes[part])
            assert isinstance(linear, nn.Linear)
            setattr(model.get_submodule(parent), leaf, AdaptedLinear(linear, layer.method))
            for key in own:
                found[f"{homes[part]}.{key}"] = _pieces(key, tensors[f"{name}.{key}"], layer.groups)[place]
    for name, tensor in tensors.items():
        if name not in taken:
            found |= dict(names.published(name, tensor))
    return found


def fused(
    names: Names, ours: Backbone, theirs: Mapping[str, AdaptedLinear], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, AdaptedLinear], dict[str, Tensor]]:
    """The other way: layers of ours, and by our names what trains and is remembered; the model stays as it is.

    KeyError where a layer's parts are not adapted alike, or a tensor is none of the model's.
    """
    layers: dict[str, AdaptedLinear] = {}
    found: dict[str, Tensor] = {}
    rest = dict(tensors)
    for target in ours.targets:
        linear = ours.model.get_submodule(target.layer)
        assert isinstance(linear, nn.Linear)
        homes = list(names.layers(target.layer, torch.empty(linear.weight.shape, device="meta")))
        adapted = [part for part, home in enumerate(homes) if home in theirs]
        if not adapted:
            continue
        first = theirs[homes[adapted[0]]]
        meta = plain(torch.empty(linear.weight.shape, device="meta"), None)
        layers[target.layer] = AdaptedLinear(meta, first.method, len(target.parts), adapted)
        for key in (*first.factor_names, *first.buffer_names):
            pieces = [rest.pop(f"{homes[part]}.{key}") for part in adapted]
            found[f"{target.layer}.{key}"] = torch.cat(pieces, dim=_along(key))
    for name, tensor in ours.model.state_dict().items():
        if any(each in rest for each, _ in names.published(name, tensor)):
            found[name] = whole = torch.empty(tensor.shape)
            places = torch.arange(tensor.numel()).view(tensor.shape)  # published, they say where each entry goes
            for each, part in names.published(name, places):
                whole.view(-1)[part.flatten()] = rest.pop(each).float().flatten()
    if rest:
        raise KeyError(next(iter(rest)))
    return layers, found


def _along(key: str) -> int:
    """The dimension in which a tensor of a layer has its row groups one after another."""
    return 1 if key == "a" else 0


def _pieces(key: str, tensor: Tensor, groups: int) -> tuple[Tensor, ...]:
    return tensor.chunk(groups, dim=_along(key))


def fill(names: Names, model: nn.Module, ours: Mapping[str, Tensor]) -> None:
    """Gives Transformers' model the numbers of ours, by our names."""
    places = model.state_dict()
    with torch.no_grad():
        for name, tensor in ours.items():
            for each, part in names.published(name, tensor):
                places[each].copy_(part)
