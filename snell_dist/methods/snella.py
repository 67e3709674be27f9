"""SNELLA: SNELL with a mixed kernel and sparsities learned under one budget (released code of SNELL's authors).

    K     = D + alpha softmax(D / gamma) + beta      D: SNELL's distance kernel; the softmax over the out axis
    delta = K |K| where |K| > t, else 0              t: the quantile of |K| at the matrix's own sparsity

The allocator moves the sparsities once an epoch: the entries that survive in all matrices together fall to
`target_sparsity` with the cube of the time left, and go where the factors' |p dL/dp| is large (ops/allocator.py).

Parameters: r (in + out) + 3 a matrix. Memory: SNELL's, and with the allocator two averages of each factor.
Sparsity 0 loses the smallest entry and squares the rest, as released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from snell_dist.config import Section
from snell_dist.methods import Place, adapted_layers
from snell_dist.methods._kernel import SparseKernelMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snell_dist.adapted import AdaptedLinear
    from snell_dist.methods import Tensors
    from snell_dist.ops import Allocator as Shares
    from snell_dist.ops import ThresholdState

UNTOUCHED = -1
KINDS = "mean", "spread"


@dataclass
class _Memory:
    """The layer's thresholds, and its sparsities as of a version of its buffer."""

    thresholds: ThresholdState
    version: int = -1
    sparsities: list[float] = field(default_factory=list)


class Allocator(Section):
    target_sparsity: float = Field(ge=0, lt=1, description="of all matrices together, at the end")
    epochs: int | None = Field(None, ge=1, description="over which the budget falls; null: those of the training")
    init_warmup: int = Field(0, ge=0, description="epochs that keep the first sparsity")
    final_warmup: int = Field(0, ge=0, description="last epochs, at the target")
    interval: int = Field(1, ge=1, description="epochs between allocations")
    beta1: float = Field(0.85, ge=0, lt=1, description="average of |p dL/dp|")
    beta2: float = Field(0.85, ge=0, lt=1, description="average of its deviation")
    metric: Literal["sensitivity", "magnitude"] = "sensitivity"


class Snella(SparseKernelMethod):
    name: Literal["snella"]
    about: ClassVar[str] = "SNELLA: SNELL with a mixed kernel and learned sparsities"
    kernel: Literal["snella"] = "snella"
    sparsity: float = Field(0.0, ge=0, lt=1, description="fraction of each delta that is zero, at the start")
    allocator: Allocator | None = Field(None, description="moves the sparsities; null: they stay")

    def buffers(self, linear: nn.Linear, groups: int) -> dict[str, Tensor]:
        """Entries kept in each row group, and the allocator's averages beside each factor."""
        import torch

        if self.allocator is None:
            return {}
        a, b = (linear.in_features, groups * self.rank), (linear.out_features, self.rank)
        averages = {f"{kind}_{name}": torch.zeros(shape) for name, shape in (("a", a), ("b", b)) for kind in KINDS}
        return {"kept": torch.full((groups,), UNTOUCHED, dtype=torch.int64), **averages}

    def sparsity_of(self, layer: AdaptedLinear) -> float | Sequence[float]:
        if self.allocator is None:
            return self.sparsity
        kept, memory = layer.get_buffer("kept"), layer.memory
        if memory.version != kept._version:  # read from the device after a change only
            memory.version, memory.sparsities = kept._version, [self.sparsity_at(layer, n) for n in kept.tolist()]
        return memory.sparsities

    def memory(self) -> _Memory:
        return _Memory(super().memory())

    def thresholds(self, layer: AdaptedLinear) -> ThresholdState:
        return layer.memory.thresholds

    def sparsity_at(self, layer: AdaptedLinear, kept: int) -> float:
        """Of a row group that keeps so many entries."""
        from snell_dist.ops.allocator import MOST

        return self.sparsity if kept == UNTOUCHED else min(1 - kept / _size(layer), MOST)

    def watched(self, model: nn.Module) -> list[str]:
        return [f"{name}.{f}" for name, _ in adapted_layers(model) for f in "ab"] if self.allocator else []

    def after_step(self, model: nn.Module, place: Place, weights: Tensors, gradients: Tensors) -> None:
        if self.allocator is None:
            return
        layers = dict(adapted_layers(model))
        shares = self._shares(layers, place)
        for name, layer in layers.items():
            factors = [(weights[f"{name}.{f}"], gradients[f"{name}.{f}"]) for f in "ab"]
            for g, pairs in enumerate(_by_group(layer, factors)):
                shares.observe(f"{name}.{g}", pairs)
        epoch, rest = divmod(place.step + 1, place.steps_per_epoch)
        if rest or epoch > (self.allocator.epochs or place.epochs):
            return
        found = shares.allocate(epoch)
        for name, layer in layers.items():
            kept = [round((1 - found[f"{name}.{g}"]) * _size(layer)) for g in range(layer.groups)]
            layer.get_buffer("kept").copy_(layer.get_buffer("kept").new_tensor(kept))

    def _shares(self, layers: dict[str, AdaptedLinear], place: Place) -> Shares:
        """The allocator over the layers' own buffers."""
        from snell_dist import ops

        assert self.allocator is not None
        averages: dict[str, Any] = {}
        sparsity: dict[str, float] = {}
        for name, layer in layers.items():
            pairs = [tuple(layer.get_buffer(f"{kind}_{factor}") for kind in KINDS) for factor in "ab"]
            for g, own in enumerate(_by_group(layer, pairs)):
                averages[f"{name}.{g}"] = own
            each = self.sparsity_of(layer)
            assert not isinstance(each, float)
            sparsity |= {f"{name}.{g}": s for g, s in enumerate(each)}
        given = self.allocator
        return ops.Allocator(
            {f"{name}.{g}": _size(layer) for name, layer in layers.items() for g in range(layer.groups)},
            initial=self.sparsity, target=given.target_sparsity, epochs=given.epochs or place.epochs,
            init_warmup=given.init_warmup, final_warmup=given.final_warmup, interval=given.interval,
            beta1=given.beta1, beta2=given.beta2, metric=given.metric, averages=averages, sparsity=sparsity,
        )  # fmt: skip


def _size(layer: AdaptedLinear) -> int:
    """Entries of one row group."""
    return layer.in_features * layer.out_features // layer.parts


def _by_group(layer: AdaptedLinear, pairs: list) -> list[list]:
    """Two pairs of tensors, shaped as a and as b, cut into the row groups' own (views)."""
    (a1, a2), (b1, b2) = pairs
    cut_a = [(None if t is None else t.detach().chunk(layer.groups, 1)) for t in (a1, a2)]
    cut_b = [(None if t is None else t.detach().chunk(layer.groups, 0)) for t in (b1, b2)]
    return [[tuple(None if t is None else t[g] for t in cut) for cut in (cut_a, cut_b)] for g in range(layer.groups)]
