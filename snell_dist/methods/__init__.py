"""Methods: how a pretrained model is adapted. One file a method, found by its name.

A method is a config section that can say what it trains (`Method`), or one that adds factors to
linear layers (`LinearMethod`). Freezing, counting, saving and sharding follow from `trainable`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from snell_dist.config import ConfigError, Plugin, Problem, Section, UserError, check, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snell_dist.adapted import AdaptedLinear


class Method(Section):
    """What every method says. `targets` below maps names of linear layers to their number of row groups."""

    name: str

    def inject(self, model: nn.Module, targets: Mapping[str, int]) -> None:
        """Puts what the method adds into the model, in place."""

    def trainable(self, model: nn.Module, besides: Iterable[str]) -> list[str]:
        """Names of the parameters that train, in the model's order; `besides`: what the paper trains in this family.

        Raises ConfigError where a glob matches nothing.
        """
        raise NotImplementedError

    def after_step(self, model: nn.Module, step: int) -> None:
        """For methods with a schedule of their own."""


class LinearMethod(Method):
    """A method that adds factors to linear layers."""

    targets: list[str] = Field(["*"], min_length=1, description="linear layers (globs over the backbone's targets)")
    also_train: list[str] | None = Field(
        None, description="parameters (globs) that train besides the factors; null: the paper's for this backbone"
    )

    def factors(self, in_features: int, out_features: int, groups: int) -> dict[str, Tensor]:
        """Initial factors of one layer, each [features, n], float32. ConfigError where they do not fit it."""
        raise NotImplementedError

    def memory(self) -> Any:
        """What a layer keeps between calls to save work; results never depend on it."""
        return None

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        raise NotImplementedError

    def delta(self, layer: AdaptedLinear) -> Tensor:
        """What the layer adds to its weight, [out, in]."""
        raise NotImplementedError

    def inject(self, model: nn.Module, targets: Mapping[str, int]) -> None:
        from torch import nn

        from snell_dist.adapted import AdaptedLinear

        for pattern in self.targets:
            if not any(_matches(name, pattern) for name in targets):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
                raise ConfigError(
                    Problem("method.targets", f"matches no linear layer (layers end in: {known})", pattern)
                )
        for name, groups in targets.items():
            if any(_matches(name, pattern) for pattern in self.targets):
                parent, _, leaf = name.rpartition(".")
                linear = model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                setattr(model.get_submodule(parent), leaf, AdaptedLinear(linear, self, groups))

    def trainable(self, model: nn.Module, besides: Iterable[str]) -> list[str]:
        factors = [f"{name}.{factor}" for name, layer in adapted_layers(model) for factor in layer.factor_names]
        others = besides if self.also_train is None else select(model, self.also_train, "method.also_train")
        return select(model, [*factors, *others])


def check_rank(rank: int, in_features: int, out_features: int) -> None:
    """A rank above the smaller side of the matrix is a mistake: the factors would be larger than the matrix."""
    if rank > min(in_features, out_features):
        allowed = f"allowed: at most {min(in_features, out_features)}"
        raise ConfigError(
            Problem("method.rank", f"is larger than a layer of {in_features} x {out_features} ({allowed})", rank)
        )


def adapted_layers(model: nn.Module) -> list[tuple[str, AdaptedLinear]]:
    """Qualified names and layers that carry factors."""
    from snell_dist.adapted import AdaptedLinear

    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]


def select(model: nn.Module, patterns: Iterable[str], key: str | None = None) -> list[str]:
    """Names of the parameters that any glob matches, in the model's order; a prefix such as `head` means all below it.

    Raises ConfigError naming `key` where one of the globs matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    patterns = list(patterns)
    for pattern in patterns if key else ():
        if not any(_matches(name, pattern) for name in names):
            raise ConfigError(Problem(str(key), f"matches no parameter{nearest(pattern, names)}", pattern))
    exact = set(patterns)
    globs = [pattern for pattern in patterns if pattern not in names]
    return [name for name in names if name in exact or any(_matches(name, glob) for glob in globs)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def freeze_all_but(model: nn.Module, names: Iterable[str]) -> None:
    """Leaves gradients on the named parameters only. Raises UserError where nothing would train."""
    chosen = set(names)
    if not chosen:
        raise UserError("method: nothing would train; name parameters in also_train, or linear layers in targets")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)


def adapt(model: nn.Module, method: str, *, groups: Mapping[str, int] | None = None, **options: Any) -> nn.Module:
    """Adapts any model in place, in one line: `adapt(model, "snell", rank=8, sparsity=0.9, also_train=["head"])`.

    Every nn.Linear is adapted unless `targets=[globs]` says less; `also_train=[globs]` names parameters
    that train besides; all else is frozen. The other options are those of the method's config section.
    `groups` maps globs to the number of row groups of fused layers; timm's `attn.qkv` counts as three.
    Raises ConfigError for an unknown method or option, or one that does not fit a layer.
    """
    from torch import nn

    plugin = Plugin("methods")
    if method not in plugin.names():
        raise ConfigError(Problem("method", plugin.unknown(method), method))
    chosen = check({"name": method, **options}, plugin.find(method))
    assert isinstance(chosen, Method)
    fused = {"*attn.qkv": 3, **(groups or {})}
    trained = set(select(model, options.get("also_train") or ()))
    targets = {
        name: next((n for pattern, n in reversed(fused.items()) if fnmatch.fnmatchcase(name, pattern)), 1)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and f"{name}.weight" not in trained
    }
    chosen.inject(model, targets)
    freeze_all_but(model, chosen.trainable(model, ()))
    return model


def merge(model: nn.Module) -> nn.Module:
    """Folds every delta into its weight, in place: plain layers, the model's original keys."""
    for name, layer in adapted_layers(model):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.merged())
    return model
