"""Masked autoencoders (He et al., 2022): timm's names, with a decoder beside them that the report lists."""

from __future__ import annotations

from snell_dist.weights._names import State

NAME = "MAE"


def matches(state: State) -> bool:
    return {"mask_token", "decoder_pos_embed", "patch_embed.proj.weight"} <= state.keys()


def convert(state: State) -> State:
    return state
