"""Full sparse tuning: a fixed fraction of the weight's own entries trains, chosen once, before training.

    y = x (W0 + delta * mask)^T + bias

The mask keeps the entries with the largest sum of squared gradients over some training images, as SPT does (He et
al., 2023), or the largest weights. The budget is of each matrix, or one for all (then a matrix may get none).

Parameters: (1 - sparsity) in out a matrix do the work, but delta, its gradient and two Adam moments are dense, and
the mask is another byte an entry: the rival whose memory SNELL spares.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from snell_dist.config import ConfigError, Problem
from snell_dist.methods import LinearMethod, adapted_layers, add_into

if TYPE_CHECKING:
    from torch import Tensor, nn

    from snell_dist.adapted import AdaptedLinear


class Sparse(LinearMethod):
    name: Literal["sparse"]
    about: ClassVar[str] = "full sparse tuning: chosen entries (1% unless told otherwise), stored densely"
    sparsity: float = Field(0.99, ge=0, lt=1, description="fraction of entries that stay as they are")
    criterion: Literal["sensitivity", "magnitude"] = Field(
        "sensitivity", description="squared gradients over training images, or the weights' own size"
    )
    budget: Literal["matrix", "global"] = Field("matrix", description="the sparsity of each matrix, or of all together")
    calibration_batches: int = Field(8, ge=1, description="micro-batches of training images that sensitivity looks at")

    def factors(self, linear: nn.Linear, groups: int) -> dict[str, Tensor]:
        import torch

        return {"delta": torch.zeros(linear.weight.shape)}

    def buffers(self, linear: nn.Linear, groups: int) -> dict[str, Tensor]:
        import torch

        return {"mask": torch.ones(linear.weight.shape, dtype=torch.bool)}

    def forward(self, layer: AdaptedLinear, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        recomputed = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        # The sum of weight and delta is made again in backward: kept, it would hold a whole matrix a layer, and keep
        # a sharded weight gathered. What is recomputed ends before the product.
        delta, mask = layer.get_parameter("delta"), layer.get_buffer("mask")
        if layer.weight.dtype == delta.dtype:
            return checkpoint(
                _merged, layer, x, layer.weight, layer.bias, delta, mask, use_reentrant=False, preserve_rng_state=False
            )
        return layer.add(layer.frozen(x), recomputed(_apart, x, delta, mask))

    def merged_weight(self, layer: AdaptedLinear) -> Tensor:
        return add_into(layer.get_parameter("delta") * layer.get_buffer("mask"), layer.rows(layer.dense))

    def calibration(self) -> int:
        return self.calibration_batches if self.criterion == "sensitivity" else 0

    def calibrate(self, model: nn.Module, losses: Iterable[Callable[[], Tensor]]) -> None:
        import torch

        layers = [layer for _, layer in adapted_layers(model)]
        deltas = [layer.get_parameter("delta") for layer in layers]
        if self.criterion == "sensitivity":
            scores, losses = [torch.zeros_like(delta) for delta in deltas], list(losses)
            if not losses:
                message = "looks at losses over training images: pass `losses`, or criterion='magnitude'"
                raise ConfigError(Problem("method.criterion", message, self.criterion))
            for loss in losses:
                for score, gradient in zip(scores, torch.autograd.grad(loss(), deltas), strict=True):
                    score.addcmul_(gradient, gradient)
        else:
            scores = [layer.rows(layer.weight).detach().float().abs() for layer in layers]
        together = _largest(scores, self.sparsity) if self.budget == "global" else None
        for i, layer in enumerate(layers):
            mask = together[i] if together else _largest([scores[i]], self.sparsity)[0]
            layer.get_buffer("mask").copy_(mask)


def _merged(
    layer: AdaptedLinear, x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor, mask: Tensor
) -> Tensor:
    from torch.nn import functional as F

    return F.linear(x, layer.with_rows(weight, layer.rows(weight) + delta * mask), bias)


def _apart(x: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    """Half precision would round the sum."""
    from torch.nn import functional as F

    return F.linear(x, (delta * mask).to(x.dtype))


def _largest(scores: list[Tensor], sparsity: float) -> list[Tensor]:
    """Masks of the largest (1 - sparsity) of all entries together, at least one; ties go to the first."""
    import torch

    flat = torch.cat([score.flatten() for score in scores])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(max(round((1 - sparsity) * len(flat)), 1)).indices] = True
    return [m.view(score.shape) for m, score in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]
