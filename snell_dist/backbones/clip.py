"""CLIP of open_clip (Radford et al., 2021; Ilharco et al., 2021): an image tower, and a text tower beside it.

Adapted: q, k, v, proj, fc1 and fc2 of every block of both towers, `visual.blocks.` and `text.blocks.`. Trained
besides: the classifier (task classify, image tower alone), or the scale of the logits (task contrastive).

open_clip's nn.MultiheadAttention keeps q, k and v in a bare parameter that no linear layer owns. It is rewritten
here, once, into plain linear layers, so that methods and sharding treat it as any other; outputs are the same to
rounding, and `attn.in_proj_weight` is called `attn.qkv.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from snell_dist.anatomy import Backbone, find_blocks, linears, number
from snell_dist.backbones import BackboneSection, Origin, display
from snell_dist.config import ConfigError, Problem, UserError, first_line, nearest

if TYPE_CHECKING:
    from torch import nn

    from snell_dist.weights import Published


class Clip(BackboneSection):
    smallest: ClassVar[dict[str, Any]] = {
        "size": "ViT-B-32", "image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "heads": 2,
        "features": 16, "text_width": 16, "text_depth": 2, "text_heads": 2, "context": 12,
    }  # fmt: skip

    has_texts: ClassVar[bool] = True

    name: Literal["clip"]
    size: str = Field("ViT-B-32", description="open_clip's name of a model whose image tower is a Vision Transformer")
    image_size: int | None = Field(None, ge=1, description="pixels a side; null: the model's")
    patch_size: int | None = Field(None, ge=1, description="pixels a side; null: the model's")
    width: int | None = Field(None, ge=1, description="of the image tower; null: the model's")
    depth: int | None = Field(None, ge=1, description="blocks of the image tower; null: the model's")
    heads: int | None = Field(None, ge=1, description="attention heads of the image tower; null: the model's")
    features: int | None = Field(None, ge=1, description="dimension in which images and texts meet; null: the model's")
    text_width: int | None = Field(None, ge=1, description="of the text tower; null: the model's")
    text_depth: int | None = Field(None, ge=1, description="blocks of the text tower; null: the model's")
    text_heads: int | None = Field(None, ge=1, description="attention heads of the text tower; null: the model's")
    context: int | None = Field(None, ge=3, description="tokens of a text; null: the model's")
    attention: Literal["fused", "explicit"] = Field(
        "fused", description="fused: torch's kernels; explicit: softmax(q k^T) v, which stores the scores of each pair"
    )
    templates: list[str] = Field(["a photo of a {}."], min_length=1, description="captions of a class, {} its name")
    head: Literal["new", "file", "zeroshot"] = Field(  # type: ignore[assignment]
        "new", description="the classifier: new, the weights' own, or the text tower's directions of the classes"
    )

    @field_validator("templates")
    @classmethod
    def _take_one_name(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if "{}" not in template or set("{}") & set(template.replace("{}", "", 1)):
                raise ValueError(f"{template!r} must have one {{}}, where the class name goes, and no other brace")
        return templates

    @classmethod
    def sizes(cls) -> list[str]:
        return [name for name in _open_clip().list_models() if _is_ours(_open_clip().get_model_config(name))]

    def make(self, classes: int) -> Backbone:
        from snell_dist.backbones import _towers

        model, shape = self._model()
        head = _towers.new_head(int(self.settings()["embed_dim"]), classes)
        return self._backbone(_towers.Classifier(model.visual, head), shape, ["head"])

    def library_model(self, classes: int) -> nn.Module:
        from snell_dist.backbones import _towers

        return _towers.plain(self.settings())

    def build(self, classes: Sequence[str]) -> Backbone:
        if self.head != "zeroshot":
            return super().build(classes)
        from snell_dist.backbones import _towers

        towers = self.towers()
        captions = [[template.format(name) for template in self.templates] for name in classes]
        head = _towers.zero_shot_head(towers.model, [towers.tokenized(texts) for texts in captions])
        model: Any = towers.model
        return self._backbone(_towers.Classifier(model.visual, head, normalize=True), towers.image_shape[1], ["head"])

    def towers(self) -> Backbone:
        model, shape = self._model()
        backbone = self._backbone(model, shape, ["logit_scale", "logit_bias"])
        self.fill(backbone)
        return backbone

    def own_name(self, name: str) -> str:
        return re.sub(r"\battn\.in_proj_(weight|bias)$", r"attn.qkv.\1", name)

    def library_name(self, name: str) -> str:
        return re.sub(r"(resblocks\.\d+\.attn)\.qkv\.(weight|bias)$", r"\1.in_proj_\2", name)

    def tagged(self, tag: str) -> Published:
        from snell_dist.weights import Published

        try:
            model = _open_clip().create_model(self.size, pretrained=tag)
        except Exception as error:  # the hub's errors have no common class
            message = f"open_clip cannot load them for {self.size}: {first_line(error)}"
            raise UserError(f"backbone.weights = {tag!r}: {message}") from None
        return Published(f"{self.size} {tag}", "open_clip", dict(model.state_dict()))

    def origin(self, tag: str) -> Origin:
        said = _open_clip().get_pretrained_cfg(self.size, tag) or {}
        return Origin(said.get("hf_hub", "").strip("/") or None, said.get("license"))

    def settings(self) -> dict[str, Any]:
        """open_clip's configuration with our own shape in it."""
        known = _open_clip().list_models()
        if self.size not in known or not _is_ours(_open_clip().get_model_config(self.size)):
            near = nearest(self.size, self.sizes())
            message = f"open_clip has no such model with a Vision Transformer{near} (see snell backbones ls clip)"
            raise ConfigError(Problem("backbone.size", message, self.size))
        settings = _open_clip().get_model_config(self.size)
        vision = {
            "image_size": self.image_size, "patch_size": self.patch_size, "width": self.width, "layers": self.depth,
            "head_width": self.width // self.heads if self.width and self.heads else None,
        }  # fmt: skip
        text = {
            "width": self.text_width, "layers": self.text_depth, "heads": self.text_heads,
            "context_length": self.context,
        }  # fmt: skip
        for part, own in (("vision_cfg", vision), ("text_cfg", text)):
            settings[part] |= {key: value for key, value in own.items() if value is not None}
        return settings | ({"embed_dim": self.features} if self.features else {})

    def _model(self) -> tuple[Any, int]:
        """Both towers with rewritten attention, and pixels a side."""
        from snell_dist.backbones import _towers

        settings = self.settings()
        if self.width and self.heads and self.width % self.heads:
            raise ConfigError(Problem("backbone.heads", f"must divide width {self.width}", self.heads))
        image_size = settings["vision_cfg"]["image_size"]
        patch = settings["vision_cfg"].get("patch_size")
        if patch and image_size % patch:
            raise ConfigError(Problem("backbone.image_size", f"must be a multiple of patch_size {patch}", image_size))
        return _towers.make(settings, fused=self.attention == "fused"), image_size

    def _backbone(self, model: nn.Module, image_size: int, besides: list[str]) -> Backbone:
        names = find_blocks(model).values()
        images = number((name for name in names if name.startswith("visual.")), "visual.")
        texts = number((name for name in names if not name.startswith("visual.")), "text.")
        own = {key: value for key, value in self.model_dump(exclude_none=True).items() if key in SHAPE}
        return Backbone(
            name=display(self.size, own, {}),
            model=model,
            blocks=images | texts,
            image_shape=(3, image_size, image_size),
            besides=besides,
            targets=linears(model, (images | texts).values()),
            token_blocks=list(images),
            tokenize=self._tokenize,
            templates=self.templates,
        )

    def tokenizer(self) -> Any:
        """open_clip's, from texts to tokens. UserError where it cannot be had."""
        context = self.settings()["text_cfg"].get("context_length", 77)
        try:
            return _open_clip().get_tokenizer(self.size, context_length=context)
        except Exception as error:  # the hub's errors have no common class
            message = f"its tokenizer comes from the hub, which does not give it: {first_line(error)}"
            raise UserError(f"backbone.size = {self.size!r}: {message}") from None

    def _tokenize(self, texts: Sequence[str]) -> Any:
        return self.tokenizer()(list(texts))


SHAPE = [
    "image_size",
    "patch_size",
    "width",
    "depth",
    "heads",
    "features",
    "text_width",
    "text_depth",
    "text_heads",
    "context",
]


def _is_ours(settings: dict[str, Any]) -> bool:
    """Whether the image tower is a Vision Transformer and the text tower open_clip's own."""
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    blocks = isinstance(vision.get("layers"), int) or str(vision.get("timm_model_name", "")).startswith("vit_")
    return blocks and "hf_model_name" not in text and "multimodal_cfg" not in settings


def _open_clip() -> Any:
    """Imported when first needed: it takes seconds."""
    import open_clip

    return open_clip
