"""What the harness knows of a model without knowing its family: blocks, linear layers, classifier.

Layers are named in one grammar for all families (`targets`, `also_train`):

    q, fc1                the part of that name in every block; q, k, v are row groups of a fused qkv
    blocks.2.mlp.fc1      a layer by its own name; globs as in *.fc1
    blocks.-4:            all of the last four blocks; blocks.0:2.q, visual.blocks.-1.proj (CLIP's image tower)

Blocks are numbered through all stages, in order.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from snell_dist.config import ConfigError, Problem, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

# What the libraries call the linear layers of a block, and what they are.
PARTS = {
    "qkv": ("q", "k", "v"),
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "out_proj": ("proj",),
    "c_fc": ("fc1",),
    "c_proj": ("fc2",),
    "fc1_g": ("fc1",),
    "fc1_x": ("fc1",),
}
BLOCK = re.compile(r"(?:.*\.)?(?:blocks|resblocks|layers|layer)\.\d+")
SLICE = re.compile(r"(?:(?P<tower>\w+)\.)?blocks\.(?P<slice>-?\d*:-?\d*|-?\d+)(?:\.(?P<rest>.+))?")


@dataclass(frozen=True)
class Target:
    """A linear layer that can be adapted; `parts` names its equal row groups, one for a plain layer."""

    layer: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Backbone:
    """A built model and its anatomy. `blocks` maps `blocks.0`, `visual.blocks.0`, ... to the modules' own names."""

    name: str
    model: nn.Module
    blocks: dict[str, str]  # in order: the unit of activation checkpointing and of sharding
    image_shape: tuple[int, int, int]  # channels, height, width
    besides: list[str]  # what the paper trains besides the factors in this family (names of parameters, prefixes)
    targets: list[Target]
    head: tuple[str, ...] = ("head",)  # the classifier: new for every task, and no part of the fingerprint
    token_blocks: list[str] = field(default_factory=list)  # addresses of blocks that take plain tokens [B, N, D]
    tokenize: Callable[[Sequence[str]], Tensor] | None = None  # texts to tokens [B, L], for a model that reads
    templates: list[str] = field(default_factory=list)  # captions of a class, `{}` its name

    def tokenized(self, texts: Sequence[str]) -> Tensor:
        assert self.tokenize is not None, "only models with a text tower are asked"
        return self.tokenize(texts)

    @property
    def block_modules(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.blocks.values()]


def linears(model: nn.Module, inside: Iterable[str] | None = None) -> list[Target]:
    """Every plain linear layer, or those inside the named modules, with its parts by the names of PARTS."""
    from torch import nn

    prefixes = None if inside is None else tuple(f"{name}." for name in inside)
    found = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and (prefixes is None or name.startswith(prefixes)):
            leaf = name.rpartition(".")[2]
            found.append(Target(name, PARTS.get(leaf, (leaf,))))
    return found


def number(names: Iterable[str], tower: str = "") -> dict[str, str]:
    """Addresses for the blocks of one tower."""
    return {f"{tower}blocks.{i}": name for i, name in enumerate(names)}


def find_blocks(model: nn.Module) -> dict[str, str]:
    """The innermost numbered blocks of any model, by their usual names; empty where there are none."""
    names = [name for name, _ in model.named_modules() if BLOCK.fullmatch(name)]
    return number(name for name in names if not any(other.startswith(f"{name}.") for other in names))


def select_parts(
    targets: Sequence[Target], patterns: Iterable[str], blocks: Mapping[str, str], key: str = "method.targets"
) -> dict[Target, tuple[int, ...]]:
    """The layers that any pattern names, each with the numbers of its chosen row groups.

    Raises ConfigError naming `key` where one of the patterns names nothing.
    """
    chosen: dict[Target, set[int]] = {}
    for pattern in patterns:
        hits = [(t, i) for t in targets for i, part in enumerate(t.parts) if _names_part(pattern, t, part, blocks)]
        if not hits:
            parts = list(dict.fromkeys(part for target in targets for part in target.parts))
            known = f"parts: {', '.join(parts)}; blocks: {', '.join(_ends(blocks))}"
            raise ConfigError(Problem(key, f"matches no linear layer{nearest(pattern, parts)} ({known})", pattern))
        for target, i in hits:
            chosen.setdefault(target, set()).add(i)
    return {target: tuple(sorted(chosen[target])) for target in targets if target in chosen}


def select_names(
    names: Sequence[str], patterns: Iterable[str], blocks: Mapping[str, str], key: str | None = None
) -> list[str]:
    """Those of the names that any pattern matches, in their order; `head` means all below it.

    Raises ConfigError naming `key`, where one is given, if one of the patterns matches nothing.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if any(_matches(n, p) for n, p in _relative(pattern, name, blocks))}
        if key and not hits:
            raise ConfigError(Problem(key, f"matches no parameter{nearest(pattern, names)}", pattern))
        chosen |= hits
    return [name for name in names if name in chosen]


def _names_part(pattern: str, target: Target, part: str, blocks: Mapping[str, str]) -> bool:
    for name, rest in _relative(pattern, target.layer, blocks):
        renamed = f"{name.rpartition('.')[0]}.{part}".removeprefix(".")
        if any(_matches(each, rest) for each in (part, renamed, name)):
            return True
    return False


def _relative(pattern: str, name: str, blocks: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The name and the pattern; for a pattern of blocks, both inside each of those blocks."""
    yield name, pattern
    if found := SLICE.fullmatch(pattern):
        for block in _sliced(found["tower"], found["slice"], blocks):
            if name.startswith(f"{block}."):
                yield name.removeprefix(f"{block}."), found["rest"] or "*"


def _sliced(tower: str | None, text: str, blocks: Mapping[str, str]) -> list[str]:
    """Names of the blocks that a slice means, in each tower or in the named one."""
    towers: dict[str, list[str]] = {}
    for address, name in blocks.items():
        towers.setdefault(address.rpartition("blocks.")[0].rstrip("."), []).append(name)
    first, colon, last = text.partition(":")
    start = int(first) if first else None
    stop = (int(last) if last else None) if colon else ((int(first) + 1) or None)
    return [name for its, names in towers.items() if tower in (None, its) for name in names[start:stop]]


def _ends(blocks: Mapping[str, str]) -> list[str]:
    addresses = list(blocks)
    return addresses if len(addresses) < 3 else [addresses[0], "...", addresses[-1]]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def fingerprint(model: nn.Module, without: Sequence[str] = ("head",)) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the state dict in its order, the classifier left out."""
    return fingerprint_of(model.state_dict().items(), without)


def fingerprint_of(state: Iterable[tuple[str, Tensor]], without: Sequence[str]) -> str:
    """The same of the entries of a state dict, wherever they come from."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in state:
        if not any(_matches(name, prefix) for prefix in without):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
