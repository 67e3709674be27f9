"""ConvNeXt of timm (Liu et al., 2022): convolutions whose pointwise layers are linear.

Adapted: fc1 and fc2 of every block; depthwise convolutions and the reductions between stages stay frozen.
Trained besides: the head, which contains the final norm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from snell_dist.anatomy import Backbone, linears, number
from snell_dist.backbones import BackboneSection, Origin, _timm, display
from snell_dist.config import ConfigError, Problem

if TYPE_CHECKING:
    from snell_dist.weights import Published

MODULES = ("convnext",)
SHORT = {size: f"convnext_{size}" for size in ("tiny", "small", "base", "large", "xlarge")}
Stages = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=4, max_length=4)]
LEAST = 32  # pixels a side: the stem takes 4, and three stages halve


class Convnext(BackboneSection):
    smallest: ClassVar[dict[str, Any]] = {
        "size": "tiny", "image_size": 32, "depths": [1, 1, 2, 1], "widths": [8, 12, 16, 24],
    }  # fmt: skip

    name: Literal["convnext"]
    size: str = Field("base", description=f"{', '.join(SHORT)}, or timm's name of a ConvNeXt")
    image_size: int = Field(224, description=f"pixels a side, at least {LEAST}")
    channels: int = Field(3, ge=1)
    depths: Stages | None = Field(None, description="blocks of each of the four stages; null: the size's")
    widths: Stages | None = Field(None, description="channels of each of the four stages; null: the size's")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth, linear over the blocks")

    @classmethod
    def sizes(cls) -> list[str]:
        return _timm.names(SHORT, MODULES)

    def make(self, classes: int) -> Backbone:
        if self.image_size < LEAST:
            raise ConfigError(Problem("backbone.image_size", f"must be at least {LEAST}", self.image_size))
        arch = _timm.architecture(self.size, SHORT, MODULES)
        own = {"depths": self.depths, "dims": self.widths}
        model: Any = _timm.create(
            arch,
            num_classes=classes,
            in_chans=self.channels,
            drop_path_rate=self.drop_path,
            conv_mlp=False,  # small sizes have 1 x 1 convolutions, which linear layers equal
            **own,
        )
        stages = enumerate(model.stages)
        blocks = number(f"stages.{s}.blocks.{i}" for s, stage in stages for i in range(len(stage.blocks)))
        return Backbone(
            name=display(arch, own, {}),
            model=model,
            blocks=blocks,
            image_shape=(self.channels, self.image_size, self.image_size),
            besides=["head"],
            targets=linears(model, blocks.values()),
        )

    def tagged(self, tag: str) -> Published:
        return _timm.tagged(_timm.architecture(self.size, SHORT, MODULES), tag)

    def origin(self, tag: str) -> Origin:
        return _timm.origin(_timm.architecture(self.size, SHORT, MODULES), tag)
