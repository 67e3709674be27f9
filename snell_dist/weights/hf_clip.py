"""Hugging Face's CLIP, both towers or the image tower, to open_clip's names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from snell_dist.weights._names import Shapes, State, fuse_qkv, rename, renamed, split_qkv

NAME = "Hugging Face CLIP"
RULES = (
    (r"^vision_model\.", "visual."),
    (r"^text_model\.", ""),
    (r"embeddings\.class_embedding$", "class_embedding"),
    (r"embeddings\.patch_embedding\.", "conv1."),
    (r"embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"embeddings\.token_embedding\.", "token_embedding."),
    (r"encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.self_attn\.(q|k|v)_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.pre_layrnorm\.", ".ln_pre."),
    (r"\.post_layernorm\.", ".ln_post."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^text_projection\.weight$", "text_projection"),
)
TRANSPOSED = ("visual_projection.weight", "text_projection.weight")  # open_clip multiplies by them from the right
PUBLISHED = (
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.", "vision_model."),
    (r"^(token_embedding|positional_embedding|transformer|ln_final)\b", r"text_model.\1"),
    (r"\.class_embedding$", ".embeddings.class_embedding"),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.token_embedding\.", ".embeddings.token_embedding."),
    (r"\.transformer\.resblocks\.", ".encoder.layers."),
    (r"\.attn\.([qkv])\.", r".self_attn.\1_proj."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.ln_final\.", ".final_layer_norm."),
)


def matches(state: State) -> bool:
    return "vision_model.embeddings.class_embedding" in state


def convert(state: State) -> State:
    turned = {name: tensor.T if name in TRANSPOSED else tensor for name, tensor in state.items()}
    return fuse_qkv(rename(turned, *RULES), "{}.in_proj_{}")


def publish(name: str, tensor: Tensor, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    for each, part in split_qkv(name, tensor):
        published = renamed(each, *PUBLISHED)
        yield published, part.T if published in TRANSPOSED else part
