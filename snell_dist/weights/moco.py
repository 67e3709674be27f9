"""MoCo v3's pretraining (Chen et al., 2021): two encoders, of which the one that was trained by gradients counts.

The encoder's `head` is the projection of the contrastive loss and no classifier. Files of its linear probe have
timm's names behind `module.` and need no layout of their own.
"""

from __future__ import annotations

from snell_dist.weights._names import State

NAME = "MoCo v3"
OURS = "base_encoder."


def matches(state: State) -> bool:
    return f"{OURS}patch_embed.proj.weight" in state


def convert(state: State) -> State:
    inside = {name.removeprefix(OURS): tensor for name, tensor in state.items() if name.startswith(OURS)}
    return {name: tensor for name, tensor in inside.items() if not name.startswith("head.")}
