"""Settings of a SNELL adapter, and how each layer is adapted by them."""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snell_dist import ops
from snell_dist.adapted import RowGroups
from snell_dist.anatomy import PARTS
from snell_dist.config import ConfigError, Plugin, check
from snell_dist.methods import check_rank
from snell_dist.methods._kernel import KernelMethod

T = TypeVar("T")
FUSED = {name: len(parts) for name, parts in PARTS.items() if len(parts) > 1} | {"c_attn": 3}  # c_attn: GPT-2's


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
