"""An exponential moving average of what trains (`optim.ema_decay`), to measure and to keep in its place.

average <- decay average + (1 - decay) parameter, after each step, from the initial parameters on
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from snell_dist.config import UserError

if TYPE_CHECKING:
    from snell_dist.engines import Saved


class Average:
    """Of named parameters, which it leaves alone but for `in_force`. Half precision is averaged in float32."""

    def __init__(self, named: Mapping[str, nn.Parameter], decay: float) -> None:
        self._decay = decay
        self._parameters = list(named.values())
        self._averages = {f"ema/{name}": _wide(p.detach()).clone() for name, p in named.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Once after each optimizer step."""
        now = [_wide(parameter) for parameter in self._parameters]
        torch._foreach_lerp_(list(self._averages.values()), now, 1 - self._decay)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within it the parameters have the averages' values; afterwards their own again, to the bit."""
        own = [parameter.detach().clone() for parameter in self._parameters]
        _copy(self._parameters, list(self._averages.values()))
        try:
            yield
        finally:
            _copy(self._parameters, own)

    def state(self) -> dict[str, Tensor]:
        """The averages, keyed `ema/<name>`: what a resumed run needs."""
        return dict(self._averages)

    def load_state(self, saved: Saved) -> None:
        """Takes up a checkpoint's averages. UserError where it has others than these."""
        theirs = {key for key in saved.specs() if key.startswith("ema/")}
        if theirs != self._averages.keys():
            raise UserError(f"checkpoint: has {len(theirs)} averages, this configuration {len(self._averages)}")
        saved.read(self._averages)


def _wide(tensor: Tensor) -> Tensor:
    """A step of 1 - decay is less than half precision can hold."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@torch.no_grad()
def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for target, tensor in zip(to, source, strict=True):
        target.copy_(tensor)
