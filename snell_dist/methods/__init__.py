"""Methods: how a pretrained model is adapted. One file a method, found by its name.

A method is a config section that can say what it trains (`Method`), or one that adds factors to
linear layers (`LinearMethod`). Freezing, counting, saving and sharding follow from `trainable`.
"""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from snell_dist.anatomy import Backbone, Target, find_blocks, linears, select_names, select_parts
from snell_dist.config import ConfigError, Plugin, Problem, Section, UserError, check

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from snell_dist.adapted import AdaptedLinear

    Tensors = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Place:
    """Where training stands: `step` of `steps` is done, from 0; an epoch has `steps_per_epoch`."""

    step: int
    steps: int
    steps_per_epoch: int

    @property
    def epochs(self) -> int:
        return -(-self.steps // self.steps_per_epoch)


class Method(Section):
    """What every method says. The line `about` and the parameter count are what `snell methods ls` shows."""

    name: str
    about: ClassVar[str]
    mergeable: ClassVar[bool] = True

    def inject(self, backbone: Backbone) -> None:
        """Puts what the method adds into the model, in place."""

    def trainable(self, backbone: Backbone) -> list[str]:
        """Names of the parameters that train, in the model's order.

        Raises ConfigError where a glob matches nothing.
        """
        raise NotImplementedError

    def calibration(self) -> int:
        """Micro-batches of training images that `calibrate` wants to see."""
        return 0

    def calibrate(self, model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> None:
        """For methods that choose what to train before they train it; each of the calls gives one batch's loss."""

    def watched(self, model: nn.Module) -> list[str]:
        """Parameters that `after_step` wants to see whole, with their gradients."""
        return []

    def after_step(self, model: nn.Module, place: Place, weights: Tensors, gradients: Tensors) -> None:
        """For methods with a schedule of their own: what they watch, after the step, and its gradients before."""


class BesidesMethod(Method):
    """A method that trains what it adds, and besides that what the paper trains in the family."""

    also_train: list[str] | None = Field(
        None, description="parameters (globs) that train besides; null: the paper's for this backbone"
    )

    def added(self, backbone: Backbone) -> list[str]:
        """Names of the parameters that the method added."""
        raise NotImplementedError

    def trainable(self, backbone: Backbone) -> list[str]:
        names = [name for name, _ in backbone.model.named_parameters()]
        if self.also_train is None:
            others = select_names(names, backbone.besides, backbone.blocks)
        else:
            others = select_names(names, self.also_train, backbone.blocks, "method.also_train")
        chosen = {*self.added(backbone), *others}
        return [name for name in names if name in chosen]


class LinearMethod(BesidesMethod):
    """A method that adds factors to linear layers."""

    targets: list[str] = Field(["*"], min_length=1, description="linear layers: q, fc1, *.proj, blocks.-4:, ...")

    def factors(self, linear: nn.Linear, groups: int) -> dict[str, Tensor]:
        """Initial factors of a layer (a view of its adapted rows), float32. ConfigError where they do not fit it."""
        raise NotImplementedError

    def buffers(self, linear: nn.Linear, groups: int) -> dict[str, Tensor]:
        """What the layer remembers and a resumed run needs, but does not train."""
        return {}

    def memory(self) -> Any:
        """What a layer keeps between calls to save work; results never depend on it."""
        return None

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        raise NotImplementedError

    def merged_weight(self, layer: AdaptedLinear) -> Tensor:
        """The adapted rows of the weight with the delta in them, [groups * out / parts, in]."""
        raise NotImplementedError

    def inject(self, backbone: Backbone) -> None:
        from torch import nn

        from snell_dist.adapted import AdaptedLinear

        model = backbone.model
        for target, adapted in select_parts(backbone.targets, self.targets, backbone.blocks).items():
            parent, _, leaf = target.layer.rpartition(".")
            linear = model.get_submodule(target.layer)
            assert isinstance(linear, nn.Linear)
            setattr(model.get_submodule(parent), leaf, AdaptedLinear(linear, self, len(target.parts), adapted))

    def added(self, backbone: Backbone) -> list[str]:
        return [f"{name}.{factor}" for name, layer in adapted_layers(backbone.model) for factor in layer.factor_names]


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """A rank above the smaller side of the matrix is a mistake: the factors would be larger than the matrix."""
    if rank > min(in_features, out_features):
        allowed = f"allowed: at most {min(in_features, out_features)}"
        raise ConfigError(
            Problem("method.rank", f"is larger than a layer of {in_features} x {out_features} ({allowed})", rank)
        )


def add_into(delta: Tensor, weight: Tensor) -> Tensor:
    """weight + delta, in the delta's memory where its dtype can hold the sum."""
    import torch

    return delta.add_(weight) if torch.result_type(delta, weight) == delta.dtype else weight + delta


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """Qualified names and layers that carry factors."""
    from snell_dist.adapted import AdaptedLinear

    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]


def remembered(model: nn.Module) -> dict[str, Tensor]:
    """The methods' buffers by name: with what trains, all that the base lacks."""
    return {
        f"{name}.{key}": layer.get_buffer(key) for name, layer in adapted_layers(model) for key in layer.buffer_names
    }


def freeze_all_but(model: nn.Module, names: Iterable[str]) -> None:
    """Leaves gradients on the named parameters only. Raises UserError where nothing would train."""
    chosen = set(names)
    if not chosen:
        raise UserError("method: nothing would train; name parameters in also_train, or linear layers in targets")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def adapt(
    model: nn.Module,
    method: str,
    *,
    groups: Mapping[str, int] | None = None,
    losses: Iterable[Callable[[], Tensor]] = (),
    **options: Any,
) -> nn.Module:
    """Adapts any model in place, in one line: `adapt(model, "snell", rank=8, sparsity=0.9, also_train=["head"])`.

    Every nn.Linear is adapted unless `targets=[...]` says less; `also_train=[globs]` names parameters
    that train besides; all else is frozen. The other options are those of the method's config section.
    `groups` maps globs to the number of row groups of fused layers; a layer called `qkv` has q, k and v.
    `losses`: calls that each give the loss of a training batch, for methods that look before they choose (sparse).
    Raises ConfigError for an unknown method or option, or one that does not fit a layer.
    """
    plugin = Plugin("methods")
    if method not in plugin.names():
        raise ConfigError(Problem("method", plugin.unknown(method), method))
    chosen = check({"name": method, **options}, plugin.find(method))
    assert isinstance(chosen, Method)
    blocks = find_blocks(model)
    trained = select_names([name for name, _ in model.named_parameters()], options.get("also_train") or (), blocks)
    targets = [_regrouped(t, groups or {}) for t in linears(model) if f"{t.layer}.weight" not in trained]
    backbone = Backbone(
        name=type(model).__name__, model=model, blocks=blocks, image_shape=(0, 0, 0), besides=[], targets=targets,
        token_blocks=list(blocks),
    )  # fmt: skip
    chosen.inject(backbone)
    _MERGED.discard(model)
    freeze_all_but(model, chosen.trainable(backbone))
    chosen.calibrate(model, losses)
    return model


def _regrouped(target: Target, groups: Mapping[str, int]) -> Target:
    for pattern, count in groups.items():
        if fnmatch.fnmatchcase(target.layer, pattern) and count != len(target.parts):
            leaf = target.layer.rpartition(".")[2]
            return Target(target.layer, tuple(f"{leaf}.{i}" for i in range(count)) if count > 1 else (leaf,))
    return target


def check_mergeable(model: nn.Module) -> None:
    """Raises UserError where the method's change is no change of weights."""
    for name, module in model.named_modules():
        if not getattr(module, "mergeable", True):
            raise UserError(f"merge: {name}: no weight can hold what this method adds; keep the adapted model")


_MERGED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def merge(model: nn.Module) -> nn.Module:
    """Folds every delta into its weight, in place: plain layers, the model's original keys.

    Raises UserError where the method's change is no change of weights, and where the model was merged before.
    """
    from snell_dist.adapted import AdaptedLinear
    from snell_dist.packed import PackedLinear

    if model in _MERGED:
        raise UserError("merge: this model was merged before, and holds no delta any more")
    check_mergeable(model)
    _MERGED.add(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear | PackedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.merged())
    return model
