"""CLIP's image tower and the classifier on it as one Vision Transformer of timm.

open_clip: logits = W (P^T x) + bias, x the class token after its norm, P `visual.proj` [width, features]
timm:      logits = (W P^T) x + bias
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from snell_dist.backbones import _timm
from snell_dist.backbones.clip import Clip
from snell_dist.config import UserError
from snell_dist.weights._names import renamed

if TYPE_CHECKING:
    from torch import Tensor

    from snell_dist.formats._renamed import Publish

SIZES = {768: "base", 1024: "large", 1280: "huge", 1408: "giant", 1664: "gigantic"}  # by width, as timm calls them
PROJECTION, TRUNK = "visual.proj", "visual.trunk."
RULES = (
    (r"^visual\.class_embedding$", "cls_token"),
    (r"^visual\.positional_embedding$", "pos_embed"),
    (r"^visual\.conv1\.", "patch_embed.proj."),
    (r"^visual\.ln_pre\.", "norm_pre."),
    (r"^visual\.ln_post\.", "norm."),
    (r"^visual\.transformer\.resblocks\.", "blocks."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.", r".ls\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
LEADING = {"cls_token": 2, "pos_embed": 1}  # lengths of one that timm has in front


def timm_model(section: Clip, classes: int) -> Any:
    """timm's model of the image tower's shape, with a classifier. UserError where it has none such."""
    settings = section.settings()
    vision = settings["vision_cfg"]
    if "timm_model_name" in vision:
        return _timm.create(vision["timm_model_name"], num_classes=classes, global_pool=vision.get("timm_pool", "avg"))
    if vision.get("pool_type", "tok") != "tok" or vision.get("attentional_pool"):
        raise UserError(f"--format timm: the image tower of {section.size} does not pool its class token: choose onnx")
    width, patch, image = vision["width"], vision["patch_size"], vision["image_size"]
    quick = "quickgelu_" if settings.get("quick_gelu") else ""
    arch = f"vit_{SIZES.get(width, 'base')}_patch{patch}_clip_{quick}{image}"
    return _timm.create(
        arch if _is_model(arch) else f"vit_base_patch32_clip_{quick}224",
        num_classes=classes,
        img_size=image,
        patch_size=patch,
        embed_dim=width,
        depth=vision["layers"],
        num_heads=width // vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        init_values=vision.get("ls_init_value"),
    )


def _is_model(arch: str) -> bool:
    import timm

    return timm.is_model(arch)


def publish_from(weights: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> Publish:
    """`weights`: of tower and classifier by our names; `shapes`: the same on the meta device."""

    def publish(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if name.startswith(TRUNK):
            yield name.removeprefix(TRUNK), tensor
        elif name == "head.weight" and PROJECTION in shapes:
            projection = (shapes if tensor.is_meta else weights)[PROJECTION]
            yield name, (tensor.double() @ projection.double().T).float()  # one rounding
        elif name != PROJECTION:
            theirs = renamed(name, *RULES)
            yield theirs, tensor[(None,) * LEADING.get(theirs, 0)]

    return publish
