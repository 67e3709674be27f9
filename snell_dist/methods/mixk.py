"""MixK: SNELLA's mixed kernel alone, dense (released code of SNELL's authors; three of its recipes use it).

    D     = 0.1 ||b1_o - a1_i|| - 0.1 ||b2_o - a2_i||     SNELL's distance kernel
    delta = D + alpha softmax(D / gamma) + beta           the softmax over the out axis; nothing is removed or squared

Parameters: r (in + out) + 3 a matrix, the scalars alpha, gamma and beta among them. Memory: SNELL's.
The delta is not zero at the start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from snell_dist.methods._kernel import KernelMethod

if TYPE_CHECKING:
    from snell_dist.adapted import AdaptedLinear


class Mixk(KernelMethod):
    name: Literal["mixk"]
    about: ClassVar[str] = "MixK: SNELLA's mixed kernel, every entry kept"
    kernel: Literal["snella"] = "snella"

    def sparse(self, layer: AdaptedLinear) -> dict[str, Any]:
        return {"sparsity": 0.0, "sparsify": "dense"}
