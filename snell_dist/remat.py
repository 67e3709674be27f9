"""Activation checkpointing, by its one owner: blocks keep their input and recompute the rest in backward.

block      all of a block is recomputed: the least memory, one more forward
selective  results of matrix products and attention are kept, the cheap rest is recomputed
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from snell_dist.config import Section

if TYPE_CHECKING:
    from torch import nn


KEPT = re.compile(r"aten::(mm|addmm|bmm|baddbmm|convolution|_scaled_dot_product_\w+)|snell::linear")


class Remat(Section):
    policy: Literal["none", "block", "selective"] = Field("none", description="what is recomputed instead of stored")
    every: int = Field(1, ge=1, description="one in how many blocks; the others store all")


def apply(remat: Remat, blocks: Sequence[nn.Module]) -> None:
    """Wraps the blocks' forward, in place; names of modules and parameters stay as they are.

    Non-reentrant: the reentrant form gives no gradient, and no error, where a block's input needs none. The state of
    the random generators is kept, so recomputed dropout is the same.
    """
    if remat.policy == "none":
        return
    from torch.utils.checkpoint import checkpoint

    options: dict[str, Any] = {"use_reentrant": False}
    if remat.policy == "selective":
        options["context_fn"] = _selective
    for block in blocks[:: remat.every]:
        block.forward = functools.partial(checkpoint, block.forward, **options)


def _selective() -> Any:
    """A fresh pair of contexts that keep the results of dense products."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        keeps = KEPT.fullmatch(operator._schema.name)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
