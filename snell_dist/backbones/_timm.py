"""What the families of timm share: finding a model by size or timm's own name, and its published weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from snell_dist import limits
from snell_dist.backbones import Origin
from snell_dist.config import ConfigError, Problem, UserError, first_line, nearest

if TYPE_CHECKING:
    from torch import nn

    from snell_dist.weights import Published

TOLD = "factory_arguments"  # an attribute of a model


def names(short: Mapping[str, str], modules: Sequence[str]) -> list[str]:
    """The short sizes, then timm's names in these of its modules."""
    import timm

    return [*short, *(name for module in modules for name in timm.list_models(module=module))]


def architecture(size: str, short: Mapping[str, str], modules: Sequence[str]) -> str:
    """timm's name. ConfigError where it has none such in this family."""
    if size in short:
        return short[size]
    known = names(short, modules)
    if size not in known:
        others = f"(allowed: {', '.join(short)}, or a timm name; see snell backbones ls)"
        raise ConfigError(Problem("backbone.size", f"unknown value{nearest(size, known)} {others}", size))
    return size


def create(arch: str, **options: Any) -> nn.Module:
    """timm's model without weights, which remembers what its factory was told (`TOLD`).

    ConfigError where it does not take one of the options.
    """
    import timm

    told = {key: value for key, value in options.items() if value is not None}
    try:
        model = timm.create_model(arch, **told)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if limits.ran_out(error):
            raise
        raise ConfigError(Problem("backbone", f"timm cannot make {arch}: {first_line(error)}")) from None
    setattr(model, TOLD, told)
    return model


def set_attention(model: nn.Module, name: str) -> None:
    """`fused` or `explicit`, in every attention of timm's."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = name == "fused"  # type: ignore[assignment]


def tagged(arch: str, tag: str) -> Published:
    """Weights that timm downloads, or finds in its cache, by its tag."""
    import timm

    from snell_dist.weights import Published

    try:
        model = timm.create_model(f"{arch}.{tag}", pretrained=True)
    except Exception as error:  # the hub's errors have no common class
        message = f"timm cannot load them for {arch}: {first_line(error)}"
        raise UserError(f"backbone.weights = {tag!r}: {message}") from None
    return Published(f"{arch}.{tag}", "timm", dict(model.state_dict()))


def origin(arch: str, tag: str) -> Origin:
    """As timm's own table has it."""
    import timm

    name = f"{arch}.{tag}"
    if name not in timm.list_pretrained(arch + ".*"):
        return Origin()
    said: Any = timm.get_pretrained_cfg(name)
    return Origin(said.hf_hub_id, said.license)
