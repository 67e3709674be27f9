"""The linear kernel: K_oi = b_o . a_i, LoRA's low-rank delta (SNELL, table A6)."""

from torch import Tensor

SEGMENTS = 1
SCALARS: dict[str, float] = {}
DENSE_AT_ZERO = True
ROWS_INDEPENDENT = True


def merged(a: Tensor, b: Tensor, scalars: Tensor | None) -> Tensor:
    return b @ a.t()
