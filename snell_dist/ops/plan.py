"""The static side of one call: names and numbers that are not tensors, checked, hashable."""

from __future__ import annotations

from dataclasses import dataclass

from snell_dist.ops import kernels


@dataclass(frozen=True)
class Plan:
    """What to compute; `sparsities` has one entry for each threshold (group, or 1 for scope "matrix")."""

    kernel: str
    sparsify: str
    groups: int
    scope: str
    sparsities: tuple[float, ...]
    dropout: float = 0.0
    workspace: int = 0  # bytes for tiles; 0: as much as one matrix in the factors' dtype

    @property
    def interpolated(self) -> bool:
        """The paper's own threshold is an order statistic; the released code interpolates."""
        return self.sparsify != "paper"

    @property
    def key(self) -> str:
        """Two calls with the same key and the same factors have the same thresholds."""
        return f"{self.kernel} {self.sparsify} {self.groups} {self.scope} {self.sparsities}"

    @property
    def parts(self) -> list[range]:
        """The groups that share a threshold."""
        return [range(self.groups)] if self.scope == "matrix" else [range(g, g + 1) for g in range(self.groups)]

    def sparsity_of(self, group: int) -> float:
        return self.sparsities[0 if self.scope == "matrix" else group]

    def dense(self, sparsity: float) -> bool:
        """Sparsity 0 is the dense kernel, neither squared nor thresholded, but for SNELLA (released code)."""
        return self.sparsify == "dense" or (sparsity == 0 and bool(kernels.find(self.kernel).DENSE_AT_ZERO))

    @property
    def all_dense(self) -> bool:
        return all(map(self.dense, self.sparsities))
