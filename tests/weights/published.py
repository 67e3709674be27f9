"""Tiny models, and their weights as each publisher writes them: the layouts' inverse, made apart from them."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import open_clip
import timm
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
CLASSES = 5
SIZE = 32


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter different from its start, so that none can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + 0.05)
    return model.eval()


def vit(classes: int = CLASSES, size: int = SIZE, name: str = "vit_tiny_patch16_224", **options: object) -> nn.Module:
    shape = {"img_size": size, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return timm.create_model(name, num_classes=classes, **(shape | options)).eval()


def swin(classes: int = CLASSES, size: int = SIZE, window: int = 4) -> nn.Module:
    shape = {"img_size": size, "embed_dim": 12, "depths": (2, 2), "num_heads": (1, 2), "window_size": window}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=classes, **shape).eval()


def convnext(classes: int = CLASSES, name: str = "convnext_tiny", **options: object) -> nn.Module:
    shape = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}
    return timm.create_model(name, num_classes=classes, **(shape | options)).eval()


def clip() -> nn.Module:
    vision = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "head_width": 12}
    text = {"context_length": 12, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
    return open_clip.CLIP(16, vision, text).eval()


def images(size: int = SIZE) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(7))


def jax_vit(model: nn.Module, prefix: str = "", big_vision: bool = False) -> dict[str, np.ndarray]:
    """As Google writes it; big_vision counts its modules otherwise and may stack all blocks."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    width = model.embed_dim
    attention, mlp, second = (0, 0, 1) if big_vision else (1, 3, 2)
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
        "pre_logits/kernel": np.zeros((width, width), np.float32),
        "pre_logits/bias": np.zeros(width, np.float32),
    }
    blocks = []
    for i in range(len(model.blocks)):
        own = {name.removeprefix(f"blocks.{i}."): a for name, a in state.items() if name.startswith(f"blocks.{i}.")}
        block = {}
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * width, (j + 1) * width)
            at = f"MultiHeadDotProductAttention_{attention}/{part}"
            block[f"{at}/kernel"] = own["attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            block[f"{at}/bias"] = own["attn.qkv.bias"][rows].reshape(heads, -1)
        out = f"MultiHeadDotProductAttention_{attention}/out"
        block[f"{out}/kernel"] = own["attn.proj.weight"].T.reshape(heads, -1, width)
        block[f"{out}/bias"] = own["attn.proj.bias"]
        for at, norm in ((0, "norm1"), (second, "norm2")):
            block |= {f"LayerNorm_{at}/scale": own[f"{norm}.weight"], f"LayerNorm_{at}/bias": own[f"{norm}.bias"]}
        for j in (0, 1):
            block[f"MlpBlock_{mlp}/Dense_{j}/kernel"] = own[f"mlp.fc{j + 1}.weight"].T
            block[f"MlpBlock_{mlp}/Dense_{j}/bias"] = own[f"mlp.fc{j + 1}.bias"]
        blocks.append(block)
    if big_vision:
        arrays |= {f"Transformer/encoderblock/{name}": np.stack([b[name] for b in blocks]) for name in blocks[0]}
    else:
        arrays |= {f"Transformer/encoderblock_{i}/{name}": a for i, b in enumerate(blocks) for name, a in b.items()}
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def mae(model: nn.Module) -> dict[str, State]:
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 48)}
    decoder |= {"decoder_pos_embed": torch.zeros(1, 17, 8), "decoder_blocks.0.attn.qkv.weight": torch.zeros(24, 8)}
    return {"model": state | decoder}


def moco_linear(model: nn.Module) -> dict[str, object]:
    """What its linear probe saves: the whole model as DistributedDataParallel names it, and the training's state."""
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"epoch": 90, "arch": "vit_base", "state_dict": state, "best_acc1": torch.tensor(76.7), "optimizer": {}}


def moco_pretraining(model: nn.Module) -> dict[str, object]:
    state = {}
    for encoder, factor in (("base_encoder", 1.0), ("momentum_encoder", 0.5)):
        own = {name: factor * t for name, t in model.state_dict().items() if not name.startswith("head.")}
        own |= {"head.0.weight": torch.ones(8, 48), "head.1.running_mean": torch.zeros(8)}
        state |= {f"module.{encoder}.{name}": tensor for name, tensor in own.items()}
    return {"epoch": 300, "state_dict": state | {"module.predictor.0.weight": torch.zeros(8, 8)}}


def separate(model: nn.Module) -> State:
    state = {}
    for name, tensor in model.state_dict().items():
        if ".qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace(".qkv.", f".{part}.")] = rows.clone()
        else:
            state[name] = tensor
    return state


def swin_official(model: nn.Module) -> dict[str, State]:
    """The reduction closes a stage; index and mask buffers are saved, too."""
    state = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
        state[name.replace("head.fc.", "head.")] = tensor
    for name, buffer in model.named_buffers():
        if name.endswith(("relative_position_index", "attn_mask")):
            state[name] = buffer
    return {"model": state}


def convnext_official(model: nn.Module) -> dict[str, State]:
    rules = [
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"mlp\.grn\.weight", "grn.gamma"),
        (r"mlp\.grn\.bias", "grn.beta"),
        (r"^head\.norm", "norm"),
        (r"^head\.fc", "head"),
    ]
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor[None, None, None] if ".grn." in name else tensor
    return {"model": state}


def dinov2_official(model: nn.Module) -> State:
    """The class token has a position of its own, which the model below does not have: here it is split off."""
    state = model.state_dict()
    position = torch.full((1, 1, 48), 0.3)
    extra = {"mask_token": torch.zeros(1, 48), "register_tokens": state.pop("reg_token")}
    extra |= {"cls_token": state["cls_token"] - position, "pos_embed": torch.cat([position, state["pos_embed"]], 1)}
    return state | extra


# Layout, model, how it is published.
VIT_FILES: dict[str, Callable[[nn.Module], object]] = {
    "MAE": mae,
    "timm or open_clip": moco_linear,
    "MoCo v3": moco_pretraining,
    "ViT with separate q, k, v": separate,
}
