"""Backbones: pretrained vision models. One file a family, found by its name.

A family is a config section that makes a `Backbone` (anatomy.py): the model, and what the rest of the harness
needs to know of it without knowing the family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from snell_dist import log
from snell_dist.anatomy import Backbone
from snell_dist.config import ConfigError, Plugin, Problem, Section, check

if TYPE_CHECKING:
    from torch import nn

    from snell_dist.weights import Published


@dataclass(frozen=True)
class Origin:
    """Of published weights: their name on the Hugging Face hub and their licence; None where it is not known."""

    hub: str | None = None
    license: str | None = None


class BackboneSection(Section):
    """What every family says. `smallest`: settings of a model that a test can train in a second.

    `has_texts`: whether there is a text tower beside the image tower (`towers`).
    """

    smallest: ClassVar[dict[str, Any]] = {}
    has_texts: ClassVar[bool] = False

    name: str
    size: str
    weights: str | None = Field(
        None,
        description="null: random; a file or folder in any published layout; hub:ORG/NAME; config:NAME, a"
        " configuration that trains them; or a tag of timm or open_clip",
    )
    min_match: float = Field(0.99, ge=0, le=1, description="least share of the backbone that the weights must fill")
    head: Literal["new", "file"] = Field("new", description="the classifier: new, or the weights' own")

    @classmethod
    def sizes(cls) -> list[str]:
        """The sizes that this family knows by name."""
        raise NotImplementedError

    def make(self, classes: int) -> Backbone:
        """The model with a classifier for `classes` classes and no weights yet; works on the meta device."""
        raise NotImplementedError

    def tagged(self, tag: str) -> Published:
        """The weights that the family's library knows by this tag. UserError where they cannot be had."""
        raise NotImplementedError

    def origin(self, tag: str) -> Origin:
        """What the family's library says of the weights that it knows by this tag, without a look at them."""
        return Origin()

    def own_name(self, name: str) -> str:
        """Our name for a parameter that the family's library calls `name`."""
        return name

    def library_name(self, name: str) -> str:
        """The other way: what the family's library calls our parameter."""
        return name

    def library_model(self, classes: int) -> nn.Module:
        """The model as the family's library itself makes it, without weights; a family of towers has both."""
        return self.make(classes).model

    def build(self, classes: Sequence[str]) -> Backbone:
        """The model with its weights. ConfigError or UserError where either cannot be had."""
        backbone = self.make(len(classes))
        self.fill(backbone)
        return backbone

    def towers(self) -> Backbone:
        """Image and text tower together, with their weights, for contrastive tuning."""
        raise ConfigError(
            Problem("backbone.name", "has no text tower, which task contrastive needs (clip has)", self.name)
        )

    def fill(self, backbone: Backbone) -> None:
        """Copies the weights, if there are any, into the model."""
        if self.weights is None:
            if self.head == "file":
                raise ConfigError(Problem("backbone.head", "needs backbone.weights, whose classifier it is", self.head))
            return
        from snell_dist import weights

        keep = self.head == "file"
        report = weights.fit(
            backbone.model, self.published(self.weights), head=backbone.head, keep_head=keep, least=self.min_match
        )
        log.info(str(report))

    def published(self, source: str) -> Published:
        """The weights that `weights` may name, under our names. UserError where they cannot be had."""
        from snell_dist import weights

        found = weights.read(source) if weights.is_source(source) else self.tagged(source)
        return replace(found, state={self.own_name(name): tensor for name, tensor in found.state.items()})


def section(name: str, **options: Any) -> BackboneSection:
    """`clip/ViT-bigG-14` as a config section. ConfigError with the nearest names where there is none."""
    family, _, size = name.partition("/")
    plugin = Plugin("backbones")
    if family not in plugin.names():
        raise ConfigError(Problem("backbone", plugin.unknown(family), name))
    chosen = check({"name": family, **({"size": size} if size else {}), **options}, plugin.find(family))
    assert isinstance(chosen, BackboneSection)
    return chosen


def display(arch: str, said: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """The library's name, and what is not as it says."""
    other = [f"{key}={value}" for key, value in said.items() if value is not None and usual.get(key) != value]
    return f"{arch}({', '.join(other)})" if other else arch
