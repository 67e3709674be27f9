"""Facebook's DINOv2 (Oquab et al., 2023): nearly timm's names, but for registers and gated MLPs."""

from __future__ import annotations

from snell_dist.weights._names import State, ends, fold_class_position, rename

NAME = "DINOv2 (Facebook)"
RULES = (
    (r"^register_tokens$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def matches(state: State) -> bool:
    return "mask_token" in state and "patch_embed.proj.weight" in state and ends(state, "blocks.0.ls1.gamma")


def convert(state: State) -> State:
    return fold_class_position(rename(state, *RULES))
