"""Fine-tuning of large vision models by SNELL: sparse tuning with kernelized LoRA (NeurIPS 2024).

>>> import snell_dist
>>> snell_dist.adapt(model, "snell", rank=8, sparsity=0.9)
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snell_dist.methods import adapt, merge

__version__ = version("snell_dist")
__all__ = ["__version__", "adapt", "merge"]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `snell --help` does not wait for torch."""
    if name in ("adapt", "merge"):
        from snell_dist import methods

        return getattr(methods, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
