"""Facebook's DeiT III (Touvron et al., 2022): timm's names but for the scales of the residual branches."""

from __future__ import annotations

from snell_dist.weights._names import State, rename

NAME = "DeiT III (Facebook)"


def matches(state: State) -> bool:
    return {"blocks.0.gamma_1", "cls_token", "pos_embed"} <= state.keys()


def convert(state: State) -> State:
    return rename(state, (r"\.gamma_([12])$", r".ls\1.gamma"))
