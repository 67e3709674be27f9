"""Fine-tuning of large vision models by SNELL: sparse tuning with kernelized LoRA (NeurIPS 2024).

>>> import snell_dist
>>> snell_dist.adapt(model, "snell", rank=8, sparsity=0.9)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snell_dist.delta import Applied, Resident, apply_delta
    from snell_dist.methods import adapt, merge
    from snell_dist.predict import Guess, Predictor, load

__version__ = version("snell_dist")
__all__ = ["Applied", "Guess", "Predictor", "Resident", "__version__", "adapt", "apply_delta", "load", "merge"]

_HOMES = {
    "adapt": "methods", "merge": "methods", "load": "predict", "Guess": "predict", "Predictor": "predict",
    "Applied": "delta", "Resident": "delta", "apply_delta": "delta",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `snell --help` does not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(f"snell_dist.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
