"""SNELL: sparse tuning with kernelized LoRA (NeurIPS 2024).

    K_oi  = 0.1 ||b1_o - a1_i|| - 0.1 ||b2_o - a2_i||        two thin factors, merged by a nonlinear kernel
    delta = K |K| where |K| > t, else 0                      t: the `sparsity` quantile of |K| in the matrix
    y     = x (W0 + delta)^T + bias

    a [in, r] ---\\                 keep the largest
                  > kernel > K [out, in] ----> delta [out, in] + W0 (frozen)
    b [out, r] --/   full rank

Parameters: r (in + out) a matrix, LoRA's. Memory: LoRA's, and one delta at a time, rebuilt in backward.
The delta is not zero at the start, so an adapted model differs from the pretrained one before step 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from snell_dist.methods._kernel import SparseKernelMethod


class Snell(SparseKernelMethod):
    name: Literal["snell"]
    about: ClassVar[str] = "SNELL: kernelized LoRA, its largest entries kept"
    kernel: Literal["distance", "linear", "sigmoid", "rbf"] = Field("distance", description="table A6 of the paper")
    sparsity: float = Field(
        0.9, ge=0, lt=1, description="fraction of each delta that is zero; 0: dense and not squared"
    )
