"""Hugging Face's CLIP, both towers or the image tower, to open_clip's names."""

from __future__ import annotations

from snell_dist.weights._names import State, fuse_qkv, rename

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


def matches(state: State) -> bool:
    return "vision_model.embeddings.class_embedding" in state


def convert(state: State) -> State:
    turned = {name: tensor.T if name in TRANSPOSED else tensor for name, tensor in state.items()}
    return fuse_qkv(rename(turned, *RULES), "{}.in_proj_{}")
