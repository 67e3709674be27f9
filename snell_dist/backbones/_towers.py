"""CLIP's modules: attention in plain linear layers, and a classifier on the image tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Self-attention of an nn.MultiheadAttention, whose parameters it takes over; called as open_clip calls that.

    fused: by torch's kernels; else as written, with the scores stored.
    """

    def __init__(self, given: nn.MultiheadAttention, fused: bool = True) -> None:
        super().__init__()
        self.fused_attn = fused  # as timm calls it
        width = given.embed_dim
        self.heads = given.num_heads
        self.qkv = nn.Linear(width, 3 * width, device="meta")
        self.qkv.weight, self.qkv.bias = given.in_proj_weight, given.in_proj_bias
        self.out_proj = nn.Linear(width, width, device="meta")
        self.out_proj.weight, self.out_proj.bias = given.out_proj.weight, given.out_proj.bias

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """x [B, N, D], which key and value are, too; attn_mask [N, N] is added to the scores."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, heads, N, D / heads]
        mask = None if attn_mask is None else attn_mask.to(qkv.dtype)
        q, k, v = qkv.unbind()
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            y = (scores if mask is None else scores + mask).softmax(-1) @ v
        return self.out_proj(y.transpose(1, 2).flatten(2)), None


class Classifier(nn.Module):
    """Images [B, 3, H, W] to logits [B, classes]; `normalize`: on features of length 1, as texts meet them."""

    def __init__(self, visual: nn.Module, head: nn.Linear, normalize: bool = False) -> None:
        super().__init__()
        self.visual, self.head, self.normalize = visual, head, normalize

    def forward(self, images: Tensor) -> Tensor:
        features = self.visual(images)
        return self.head(F.normalize(features, dim=-1) if self.normalize else features)


def plain(settings: dict[str, Any]) -> Any:
    """open_clip's model of these settings, without weights."""
    custom = settings.pop("custom_text", False) or "timm_model_name" in settings["vision_cfg"]
    if "timm_model_name" in settings["vision_cfg"]:
        settings["vision_cfg"]["timm_model_pretrained"] = False
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**settings)


def make(settings: dict[str, Any], fused: bool = True) -> nn.Module:
    """The same, its attention rewritten, fused or as written."""
    model = plain(settings)
    for parent in list(model.modules()):
        if hasattr(parent, "fused_attn"):  # of a tower that timm makes
            parent.fused_attn = fused
        if isinstance(parent, open_clip.transformer.Transformer):
            parent.get_cast_dtype = _float32
        for name, child in list(parent.named_children()):
            if type(child) is nn.MultiheadAttention and isinstance(
                parent, open_clip.transformer.ResidualAttentionBlock
            ):
                setattr(parent, name, Attention(child, fused))
    return model


def _float32() -> torch.dtype:
    """Texts flow in float32 whatever the weights are stored in, as images do; autocast decides on products."""
    return torch.float32


def new_head(features: int, classes: int) -> nn.Linear:
    """As the paper's: truncated normal of standard deviation 0.02, bias 0."""
    head = nn.Linear(features, classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


@torch.no_grad()
def zero_shot_head(model: Any, captions: Sequence[Tensor]) -> nn.Linear:
    """Its rows are the classes' mean caption features, times the model's scale. captions: tokens [T, L] of each."""
    training = model.training
    model.eval()
    rows = [F.normalize(model.encode_text(tokens, normalize=True).mean(0), dim=-1) for tokens in captions]
    model.train(training)
    head = nn.Linear(len(rows[0]), len(rows))
    head.weight.copy_(model.logit_scale.exp() * torch.stack(rows))
    nn.init.zeros_(head.bias)
    return head
