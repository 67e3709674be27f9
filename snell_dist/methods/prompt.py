"""Visual prompts (VPT-deep; Jia et al., 2022): trained tokens beside the image's, anew in every block.

    block_i([x, p_i]) -> [x', dropped]

Parameters: count x width a block. Memory: every block's activations grow by the prompts' share of the tokens.
Only for blocks that take plain tokens [B, N, D]; no weight can hold prompts, so they cannot be merged.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from snell_dist.anatomy import Backbone
from snell_dist.config import ConfigError, Problem
from snell_dist.methods import BesidesMethod


class Prompt(BesidesMethod):
    name: Literal["prompt"]
    about: ClassVar[str] = "VPT-deep: trained tokens in every block"
    mergeable: ClassVar[bool] = False
    count: int = Field(10, ge=1, description="prompts a block")

    def inject(self, backbone: Backbone) -> None:
        from snell_dist.prompts import Prompts

        if not backbone.token_blocks:
            raise ConfigError(Problem("method.name", f"the blocks of {backbone.name} take no plain tokens", self.name))
        for address in backbone.token_blocks:
            name = backbone.blocks[address]
            first = next(target.layer for target in backbone.targets if target.layer.startswith(f"{name}."))
            width = backbone.model.get_submodule(first).in_features
            Prompts(self.count, int(width)).attach(backbone.model.get_submodule(name))  # type: ignore[arg-type]

    def added(self, backbone: Backbone) -> list[str]:
        return [f"{backbone.blocks[address]}.prompts.tokens" for address in backbone.token_blocks]
