"""Which class of Transformers computes what one of our models does, and its configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snell_dist import weights
from snell_dist.anatomy import Backbone
from snell_dist.backbones import BackboneSection
from snell_dist.config import UserError
from snell_dist.finished import Finished
from snell_dist.formats._zero_shot import ZeroShot

OTHERS = "choose timm or onnx"


def library() -> Any:
    """Transformers. UserError where it is missing."""
    try:
        import transformers
    except ImportError:
        raise UserError("--format hf needs transformers, which is missing: pip install 'snell_dist[export]'") from None
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    return transformers


@dataclass(frozen=True)
class Counterpart:
    name: str  # the class
    config: Any
    layout: Any  # see `weights.LAYOUTS`
    shapes: Mapping[str, Tensor]  # of our model, on the meta device

    def publish(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        return self.layout.publish(name, tensor, self.shapes)


def of(run: Finished) -> Counterpart:
    """Of a run's model. UserError where Transformers has none."""
    if run.config.backbone.name == "clip" and run.config.task.name == "classify":
        raise UserError(f"--format hf: {run.folder}: CLIPForImageClassification averages patches: choose timm or onnx")
    return counterpart(run.empty(), run.config.backbone, run.classes)


def counterpart(backbone: Backbone, section: BackboneSection, classes: Sequence[str]) -> Counterpart:
    """With the names of the classes; the model may be on the meta device. UserError where there is none."""
    model: Any = backbone.model
    find = FAMILIES.get(type(model).__name__)
    if find is None:
        raise _none_for(backbone, f"of a {type(model).__name__}")
    shapes = {section.library_name(name): tensor for name, tensor in model.state_dict().items()}
    layout, name, settings = find(model, shapes)
    transformers = library()
    if backbone.tokenize is None:
        settings["id2label"] = dict(enumerate(classes))
        settings["label2id"] = {each: i for i, each in enumerate(classes)}
    config = getattr(transformers, name).config_class(**settings, architectures=[name])
    with torch.device("meta"):
        theirs = weights.LAYOUTS[layout].convert(getattr(transformers, name)(config).state_dict())
    for each, tensor in shapes.items():
        if each not in theirs:
            raise _none_for(backbone, f"{name} has no {each}")
        if _lengths(theirs[each]) != _lengths(tensor):
            raise _none_for(backbone, f"{name} has {each} {list(theirs[each].shape)}, this model {list(tensor.shape)}")
    for each in theirs.keys() - shapes.keys() - {"mask_token"}:
        if each.rpartition(".")[2] in weights.BUFFERS:
            continue
        raise _none_for(backbone, f"{name} has {each}, this model has not")
    return Counterpart(name, config, weights.LAYOUTS[layout], shapes)


def _none_for(backbone: Backbone, why: str) -> UserError:
    return UserError(f"--format hf: Transformers has no equal of {backbone.name}: {why} ({OTHERS})")


def _lengths(tensor: Tensor) -> list[int]:
    return [n for n in tensor.shape if n != 1]


Found = tuple[str, str, dict[str, Any]]  # layout, class, settings of its configuration


def _vit(model: Any, shapes: Mapping[str, Tensor]) -> Found:
    block, patches = model.blocks[0], model.patch_embed
    if model.global_pool != "token":
        raise UserError(f"--format hf: its classifier sees the class token, this one {model.global_pool!r} ({OTHERS})")
    settings = {
        "hidden_size": model.embed_dim, "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads, "image_size": list(patches.img_size),
        "patch_size": list(patches.patch_size), "num_channels": patches.proj.in_channels,
        "qkv_bias": block.attn.qkv.bias is not None, "layer_norm_eps": block.norm1.eps,
    }  # fmt: skip
    hidden = block.mlp.fc2.in_features
    if "blocks.0.ls1.gamma" in shapes:
        gated = weights.LAYOUTS["hf_dinov2"].is_gated(shapes)
        ratio = round(hidden / model.embed_dim * (1.5 if gated else 1))
        act = "gelu" if gated else activation(block.mlp.act)
        settings |= {"mlp_ratio": ratio, "use_swiglu_ffn": gated, "hidden_act": act}
        if "reg_token" in shapes:
            registers = {"num_register_tokens": shapes["reg_token"].shape[1]}
            return "hf_dinov2", "Dinov2WithRegistersForImageClassification", settings | registers
        return "hf_dinov2", "Dinov2ForImageClassification", settings | {"use_mask_token": False}
    settings |= {"intermediate_size": hidden, "hidden_act": activation(block.mlp.act)}
    distilled = "head_dist.weight" in shapes
    return "hf_vit", "DeiTForImageClassificationWithTeacher" if distilled else "ViTForImageClassification", settings


def _swin(model: Any, shapes: Mapping[str, Tensor]) -> Found:
    block, patches = model.layers[0].blocks[0], model.patch_embed
    return "hf_swin", "SwinForImageClassification", {
        "image_size": list(patches.img_size), "patch_size": list(patches.patch_size),
        "num_channels": patches.proj.in_channels, "embed_dim": model.embed_dim,
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_heads": [stage.blocks[0].attn.num_heads for stage in model.layers],
        "window_size": block.window_size[0], "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None, "hidden_act": activation(block.mlp.act),
        "layer_norm_eps": block.norm1.eps, "drop_path_rate": 0.0,
    }  # fmt: skip


def _convnext(model: Any, shapes: Mapping[str, Tensor]) -> Found:
    blocks = [stage.blocks for stage in model.stages]
    settings = {
        "num_channels": model.stem[0].in_channels, "patch_size": model.stem[0].stride[0],
        "hidden_sizes": [stage[0].mlp.fc2.out_features for stage in blocks],
        "depths": [len(stage) for stage in blocks], "hidden_act": activation(blocks[0][0].mlp.act),
        "layer_norm_eps": model.head.norm.eps,
    }  # fmt: skip
    if weights.LAYOUTS["hf_convnext"].has_response_norm(shapes):
        return "hf_convnext", "ConvNextV2ForImageClassification", settings
    scaled = "stages.0.blocks.0.gamma" in shapes
    return "hf_convnext", "ConvNextForImageClassification", settings | {"layer_scale_init_value": 1e-6 * scaled}


def _clip(model: Any, shapes: Mapping[str, Tensor]) -> Found:
    features, width = shapes["text_projection"].shape[1], shapes["token_embedding.weight"].shape
    tower: Any = model.visual
    if getattr(tower, "pool_type", "") != "tok" or model.text_pool_type != "argmax":
        raise UserError("--format hf: CLIPModel pools class and last token, this model does not (choose open_clip)")
    vision = {"image_size": tower.image_size[0], "patch_size": tower.patch_size[0], **_tower(tower.transformer)}
    text = {
        "vocab_size": width[0], "max_position_embeddings": len(shapes["positional_embedding"]),
        "bos_token_id": width[0] - 2, "eos_token_id": width[0] - 1, **_tower(model.transformer),
    }  # fmt: skip
    both = {"projection_dim": features}
    return "hf_clip", "CLIPModel", both | {"vision_config": vision | both, "text_config": text | both}


def _tower(transformer: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": block.mlp.c_fc.in_features, "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks), "num_attention_heads": block.attn.heads,
        "hidden_act": activation(block.mlp.gelu), "layer_norm_eps": block.ln_1.eps,
    }  # fmt: skip


def activation(module: nn.Module) -> str:
    """What Transformers calls it. UserError where it has none such."""
    if getattr(module, "approximate", "none") == "tanh":
        return "gelu_pytorch_tanh"
    names = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu", "ReLU": "relu"}
    name = type(module).__name__
    if name not in names:
        raise UserError(f"--format hf: Transformers has no activation {name} ({OTHERS})")
    return names[name]


FAMILIES = {
    "VisionTransformer": _vit,
    "VisionTransformerDistilled": _vit,
    "SwinTransformer": _swin,
    "ConvNeXt": _convnext,
    "CLIP": _clip,
}


def zero_shot_logits(model: Any, told: ZeroShot, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """From images to logits, of a CLIPModel; tokens: of the captions."""
    from torch.nn.functional import normalize

    def images(pictures: Tensor) -> Tensor:
        pooled = model.vision_model(pixel_values=pictures).pooler_output
        return normalize(model.visual_projection(pooled), dim=-1)

    def texts(tokens: Tensor) -> Tensor:
        return normalize(model.text_projection(model.text_model(input_ids=tokens).pooler_output), dim=-1)

    return told.logits(images, texts, tokens, model.logit_scale.exp())
