"""timm's or open_clip's own names: nothing to convert."""

from __future__ import annotations

from snell_dist.weights._names import State

NAME = "timm or open_clip"


def matches(state: State) -> bool:
    return any(name.startswith(("patch_embed.", "stem.", "visual.")) for name in state)


def convert(state: State) -> State:
    return state
