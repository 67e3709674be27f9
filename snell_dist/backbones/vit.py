"""Vision Transformers of timm, of any size (Dosovitskiy et al., 2021).

Adapted: qkv (as three matrices), proj, fc1 and fc2 of every block. Trained besides: head and class token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from snell_dist.backbones import Backbone, BackboneSection, fingerprint, load_weights
from snell_dist.config import ConfigError, Problem, UserError

PATCH = {"tiny": 16, "small": 16, "base": 16, "large": 16, "huge": 14, "giant": 14, "gigantic": 14}
TARGETS = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}


class Vit(BackboneSection):
    name: Literal["vit"]
    size: Literal["tiny", "small", "base", "large", "huge", "giant", "gigantic"] = "base"
    image_size: int = Field(224, ge=1, description="pixels a side")
    patch_size: int | None = Field(None, ge=1, description="pixels a side; null: the size's usual one")
    channels: int = Field(3, ge=1)
    width: int | None = Field(None, ge=1, description="embedding dimension; null: the size's")
    depth: int | None = Field(None, ge=1, description="number of blocks; null: the size's")
    heads: int | None = Field(None, ge=1, description="attention heads; null: the size's")
    drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth, linear over the blocks")
    weights: str | None = Field(
        None,
        description="null: random; a .safetensors file; config:NAME, a configuration that trains them; or a timm tag",
    )

    def build(self, classes: int) -> Backbone:
        import timm

        patch = self.patch_size or PATCH[self.size]
        if self.image_size % patch:
            raise ConfigError(
                Problem("backbone.image_size", f"must be a multiple of patch_size {patch}", self.image_size)
            )
        arch = f"vit_{self.size}_patch{patch}_224"
        if not timm.is_model(arch):  # a patch size of the user's own
            arch = f"vit_{self.size}_patch{PATCH[self.size]}_224"
        own = {"embed_dim": self.width, "depth": self.depth, "num_heads": self.heads}
        options: dict[str, Any] = {key: value for key, value in own.items() if value is not None}
        if self.width and self.heads and self.width % self.heads:
            raise ConfigError(Problem("backbone.heads", f"must divide width {self.width}", self.heads))
        from_file = self.weights is not None and self.weights.endswith(".safetensors")
        tag = None if from_file else self.weights
        try:
            model: Any = timm.create_model(
                f"{arch}.{tag}" if tag else arch,
                pretrained=tag is not None,
                num_classes=classes,
                img_size=self.image_size,
                patch_size=patch,
                in_chans=self.channels,
                drop_path_rate=self.drop_path,
                **options,
            )
        except Exception as error:
            if tag is None:
                raise
            raise UserError(
                f"backbone.weights = {tag!r}: timm cannot load them for {arch}: {_first_line(error)}"
            ) from None
        if from_file:
            load_weights(model, Path(str(self.weights)))
        return Backbone(
            name=_name(f"{arch}.{tag}" if tag else arch, {"img_size": self.image_size, "patch_size": patch} | options),
            model=model,
            blocks=list(model.blocks),
            targets={f"blocks.{i}.{leaf}": n for i in range(len(model.blocks)) for leaf, n in TARGETS.items()},
            besides=["head", "cls_token"],
            image_shape=(self.channels, self.image_size, self.image_size),
            fingerprint=fingerprint(model),
        )


def _name(arch: str, options: dict[str, int]) -> str:
    """timm's name, and what is not as the name says."""
    said = {
        "img_size": int(arch.partition(".")[0].rpartition("_")[2]),
        "patch_size": int(arch.split("patch")[1].split("_")[0]),
    }
    other = [f"{key}={value}" for key, value in options.items() if said.get(key) != value]
    return f"{arch}({', '.join(other)})" if other else arch


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
