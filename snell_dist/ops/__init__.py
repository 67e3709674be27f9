"""The SNELL operator: a frozen linear layer plus a sparse, full-rank delta made of two thin factors.

y = x (W0 + delta)^T + bias,   delta = sparsified K(a, b),   a [in, r], b [out, r]
"""

from snell_dist.ops.allocator import Allocator
from snell_dist.ops.kernels import KERNELS
from snell_dist.ops.regularize import drop_paths
from snell_dist.ops.snell import ThresholdState, init_factors, merge_delta, snell_linear
from snell_dist.ops.sparsify import SPARSIFY

__all__ = [
    "KERNELS", "SPARSIFY", "Allocator", "ThresholdState", "drop_paths", "init_factors", "merge_delta", "snell_linear",
]  # fmt: skip
