"""Vision Transformers of timm, of any size (Dosovitskiy et al., 2021), and those of its other modules that have
their form: DeiT, DINOv2, SigLIP's image towers, EVA.

Adapted: q, k, v (row groups of qkv), proj, fc1 and fc2 of every block. Trained besides: head and class token.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from snell_dist.anatomy import Backbone, linears, number
from snell_dist.backbones import BackboneSection, Origin, _timm, display
from snell_dist.config import ConfigError, Problem

if TYPE_CHECKING:
    from snell_dist.weights import Published

MODULES = ("vision_transformer", "deit", "eva")
PATCH = {"tiny": 16, "small": 16, "base": 16, "large": 16, "huge": 14, "giant": 14, "gigantic": 14, "22b": 14}
# No weights of this one are published; its shape is that of ViT-22B (Dehghani et al., 2023).
SHAPES = {"22b": {"width": 6144, "depth": 48, "heads": 48, "mlp_ratio": 4.0}}
SHORT = {size: f"vit_{'gigantic' if size in SHAPES else size}_patch{patch}_224" for size, patch in PATCH.items()}


class Vit(BackboneSection):
    smallest: ClassVar[dict[str, Any]] = {
        "size": "tiny", "image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 2,
    }  # fmt: skip

    name: Literal["vit"]
    size: str = Field("base", description=f"{', '.join(PATCH)}, or timm's name of a Vision Transformer")
    image_size: int | None = Field(None, ge=1, description="pixels a side; null: the model's")
    patch_size: int | None = Field(None, ge=1, description="pixels a side; null: the size's usual one")
    channels: int = Field(3, ge=1)
    width: int | None = Field(None, ge=1, description="embedding dimension; null: the size's")
    depth: int | None = Field(None, ge=1, description="number of blocks; null: the size's")
    heads: int | None = Field(None, ge=1, description="attention heads; null: the size's")
    mlp_ratio: float | None = Field(None, gt=0, description="width of the MLP over that of the model; null: the size's")
    attention: Literal["fused", "explicit"] = Field(
        "fused", description="fused: torch's kernels; explicit: softmax(q k^T) v, which stores the scores of each pair"
    )
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth, linear over the blocks")

    @classmethod
    def sizes(cls) -> list[str]:
        return _timm.names(SHORT, MODULES)

    def make(self, classes: int) -> Backbone:
        arch, shape = self._arch(), self._shape()
        if shape["width"] and shape["heads"] and shape["width"] % shape["heads"]:
            raise ConfigError(Problem("backbone.heads", f"must divide width {shape['width']}", shape["heads"]))
        usual = _usual(arch)
        patch, image_size = self.patch_size or usual["patch_size"], self.image_size or usual["img_size"]
        if image_size % patch and (image_size, patch) != (usual["img_size"], usual["patch_size"]):
            raise ConfigError(Problem("backbone.image_size", f"must be a multiple of patch_size {patch}", image_size))
        own = {
            "img_size": image_size, "patch_size": patch, "embed_dim": shape["width"], "depth": shape["depth"],
            "num_heads": shape["heads"], "mlp_ratio": shape["mlp_ratio"],
        }  # fmt: skip
        options = {key: value for key, value in own.items() if usual.get(key) != value}
        model: Any = _timm.create(
            arch, num_classes=classes, in_chans=self.channels, drop_path_rate=self.drop_path, **options
        )
        _timm.set_attention(model, self.attention)
        for module in model.modules():
            if hasattr(module, "qkv_bias_separate"):  # else EVA takes qkv's weight past the layer, and past its delta
                module.qkv_bias_separate = True
        blocks = number(f"blocks.{i}" for i in range(len(model.blocks)))
        return Backbone(
            name=display(arch, own, usual),
            model=model,
            blocks=blocks,
            image_shape=(self.channels, image_size, image_size),
            besides=["head", "cls_token"],
            targets=linears(model, blocks.values()),
            head=("head", "head_dist") if hasattr(model, "head_dist") else ("head",),
            # With rotary embeddings attention knows each token's place.
            token_blocks=[] if getattr(model, "rope", None) is not None else list(blocks),
        )

    def tagged(self, tag: str) -> Published:
        return _timm.tagged(self._arch(), tag)

    def origin(self, tag: str) -> Origin:
        return _timm.origin(self._arch(), tag)

    def _arch(self) -> str:
        arch = _timm.architecture(self.size, SHORT, MODULES)
        if self.size in PATCH and self.patch_size:
            import timm

            other = f"vit_{self.size}_patch{self.patch_size}_224"
            return other if timm.is_model(other) else arch
        return arch

    def _shape(self) -> dict[str, Any]:
        said = {"width": self.width, "depth": self.depth, "heads": self.heads, "mlp_ratio": self.mlp_ratio}
        return {key: value or SHAPES.get(self.size, {}).get(key) for key, value in said.items()}


@functools.lru_cache
def _usual(arch: str) -> dict[str, int]:
    """Image and patch size of timm's model."""
    import torch

    with torch.device("meta"):
        model: Any = _timm.create(arch, depth=1)  # the least that has them
    return {"img_size": model.patch_embed.img_size[0], "patch_size": model.patch_embed.patch_size[0]}
