"""What a backbone is and what each method would train in it, from models on the meta device: nothing is allocated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from snell_dist.anatomy import Backbone, Target, select_names
from snell_dist.backbones import BackboneSection
from snell_dist.config import ConfigError, Plugin, check
from snell_dist.log import columns
from snell_dist.methods import Method

CLASSES = 100  # of the classifier, where one is counted
GIB = 2**30


def backbone(section: BackboneSection) -> str:
    """Parameters, bytes, FLOPs, blocks and targets. ConfigError where the model cannot be made."""
    with torch.device("meta"):
        images = section.make(CLASSES)
        whole = section.towers() if section.has_texts else images
    count = _count(whole.model, set(_outside_head(whole)))
    sizes = [f"{name} {count * width / GIB:.2f} GiB" for name, width in (("float32", 4), ("bfloat16", 2))]
    flops = [f"{_flops(images.model, torch.empty(1, *whole.image_shape, device='meta')) / 1e9:,.1f} G an image"]
    if section.has_texts:
        flops.append(f"{_flops(whole.model, None, _text(whole)) / 1e9:,.1f} G a text")
    facts = [
        ("model", whole.name),
        ("image", " x ".join(map(str, whole.image_shape))),
        ("parameters", f"{count:,} without a classifier"),
        ("bytes", ", ".join(sizes)),
        ("FLOPs", f"{', '.join(flops)}, forward"),
        ("trained besides", ", ".join(whole.besides)),
        *(("blocks", line) for line in _blocks(whole)),
    ]
    lines = [f"{key:16}{said}" for key, said in facts]
    rows = [("targets", "layer", "rows x columns", "layers", "parameters"), *_targets(whole)]
    return "\n".join([*lines, "", *columns(rows, right=(2, 3, 4))])


def methods(section: BackboneSection | None) -> str:
    """Every method in a line; with a backbone, what trains in it besides the classifier."""
    plugin = Plugin("methods")
    kinds = {name: plugin.find(name) for name in plugin.names()}
    about = {name: getattr(kind, "about", "") for name, kind in kinds.items()}
    if section is None:
        return "\n".join(columns([(name, about[name]) for name in kinds]))
    rows = [("method", "trains", "of the backbone", "merges", "")]
    for name in kinds:
        with torch.device("meta"):
            made = section.make(CLASSES)
        total = _count(made.model, set(_outside_head(made)))
        method = check({"name": name}, kinds[name])
        assert isinstance(method, Method)
        try:
            with torch.device("meta"):
                method.inject(made)
            trains = set(method.trainable(made)) & set(_outside_head(made))
            count = _count(made.model, trains)
            rows.append((name, f"{count:,}", f"{count / total:.2%}", "yes" if method.mergeable else "no", about[name]))
        except ConfigError as error:
            rows.append((name, "-", "", "", error.problems[0].message))
    return "\n".join(columns(rows, right=(1, 2)))


def _flops(model: nn.Module, *inputs: Any) -> int:
    """Of one forward pass; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval().requires_grad_(False)(*inputs)  # the counter's hooks fail on views of what requires gradients
    return counter.get_total_flops()


def _text(towers: Backbone) -> torch.Tensor:
    """Tokens [1, L] of a text of full length."""
    return torch.zeros(1, towers.model.context_length, dtype=torch.int64, device="meta")  # type: ignore[call-overload]


def _blocks(made: Backbone) -> list[str]:
    """One line for each tower."""
    towers: dict[str, list[str]] = {}
    for address, name in made.blocks.items():
        towers.setdefault(address.rpartition(".")[0], []).append(name)
    return [f"{len(names)} {tower}: {names[0]} ... {names[-1]}" for tower, names in towers.items()]


def _targets(made: Backbone) -> list[tuple[str, ...]]:
    """A row for each kind of layer: those of the same place in their block, and of the same shape."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Target]] = {}
    for target in made.targets:
        address, block = next((a, b) for a, b in made.blocks.items() if target.layer.startswith(f"{b}."))
        layer = target.layer.removeprefix(f"{block}.")
        shape = tuple(made.model.get_submodule(target.layer).weight.shape)  # type: ignore[arg-type]
        groups.setdefault((address.rpartition(".")[0], layer, shape), []).append(target)
    return [
        (
            ", ".join(found[0].parts),
            f"{tower}.*.{layer}",
            (f"{len(found[0].parts)} x " if len(found[0].parts) > 1 else "")
            + f"{rows // len(found[0].parts)} x {cols}",
            str(len(found)),
            f"{len(found) * rows * cols:,}",
        )
        for (tower, layer, (rows, cols)), found in groups.items()
    ]


def _outside_head(made: Backbone) -> list[str]:
    names = [name for name, _ in made.model.named_parameters()]
    head = select_names(names, made.head, made.blocks)
    return [name for name in names if name not in head]


def _count(model: nn.Module, names: set[str]) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name in names)
