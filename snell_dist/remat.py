"""Activation checkpointing, by its one owner: blocks keep their input and recompute the rest in backward."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from snell_dist.config import Section

if TYPE_CHECKING:
    from torch import nn


class Remat(Section):
    policy: Literal["none", "block"] = Field("none", description="what is recomputed in backward instead of stored")


def apply(remat: Remat, blocks: Iterable[nn.Module]) -> None:
    """Wraps each block's forward, in place; names of modules and parameters stay as they are.

    Non-reentrant: the reentrant form gives no gradient, and no error, where a block's input needs none.
    """
    if remat.policy == "none":
        return
    from torch.utils.checkpoint import checkpoint

    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
