"""Swin Transformers of timm (Liu et al., 2021): windows of attention in four stages.

Adapted: q, k, v (row groups of qkv), proj, fc1 and fc2 of every block; the reductions between stages stay frozen.
Trained besides: the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from snell_dist.anatomy import Backbone, linears, number
from snell_dist.backbones import BackboneSection, Origin, _timm, display
from snell_dist.config import ConfigError, Problem

if TYPE_CHECKING:
    from snell_dist.weights import Published

MODULES = ("swin_transformer",)
SHORT = {size: f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")}
REDUCTION = 32  # the patch of 4 pixels, and three halvings


class Swin(BackboneSection):
    smallest: ClassVar[dict[str, Any]] = {
        "size": "tiny", "image_size": 32, "width": 12, "depths": [2, 2], "heads": [1, 2], "window_size": 2,
    }  # fmt: skip

    name: Literal["swin"]
    size: str = Field("base", description=f"{', '.join(SHORT)}, or timm's name of a Swin Transformer")
    image_size: int | None = Field(None, ge=1, description="pixels a side, a multiple of 32; null: the model's")
    channels: int = Field(3, ge=1)
    width: int | None = Field(None, ge=1, description="embedding dimension of the first stage; null: the size's")
    depths: list[int] | None = Field(None, min_length=1, description="blocks of each stage; null: the size's")
    heads: list[int] | None = Field(None, min_length=1, description="attention heads of each stage; null: the size's")
    window_size: int | None = Field(None, ge=1, description="tokens a side; null: the size's")
    attention: Literal["fused", "explicit"] = Field(
        "explicit",
        description="fused: torch's kernels; explicit: softmax(q k^T) v, which stores the scores of each pair",
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth, linear over the blocks")

    @classmethod
    def sizes(cls) -> list[str]:
        return _timm.names(SHORT, MODULES)

    def make(self, classes: int) -> Backbone:
        arch = _timm.architecture(self.size, SHORT, MODULES)
        usual = int(arch.rpartition("_")[2])
        image_size = self.image_size or usual
        if image_size % REDUCTION:
            raise ConfigError(Problem("backbone.image_size", f"must be a multiple of {REDUCTION}", image_size))
        own = {
            "img_size": image_size, "embed_dim": self.width, "depths": self.depths, "num_heads": self.heads,
            "window_size": self.window_size,
        }  # fmt: skip
        options = {key: value for key, value in own.items() if (key, value) != ("img_size", usual)}
        model: Any = _timm.create(
            arch, num_classes=classes, in_chans=self.channels, drop_path_rate=self.drop_path, **options
        )
        _timm.set_attention(model, self.attention)
        stages = enumerate(model.layers)
        blocks = number(f"layers.{s}.blocks.{i}" for s, stage in stages for i in range(len(stage.blocks)))
        return Backbone(
            name=display(arch, own, {"img_size": usual}),
            model=model,
            blocks=blocks,
            image_shape=(self.channels, image_size, image_size),
            besides=["head"],
            targets=linears(model, blocks.values()),
        )

    def tagged(self, tag: str) -> Published:
        return _timm.tagged(_timm.architecture(self.size, SHORT, MODULES), tag)

    def origin(self, tag: str) -> Origin:
        return _timm.origin(_timm.architecture(self.size, SHORT, MODULES), tag)
