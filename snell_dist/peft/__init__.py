"""SNELL as a method of Hugging Face PEFT: importing it makes PEFT know it, and all of PEFT then works with it.

    from peft import get_peft_model
    from snell_dist.peft import SnellConfig

    model = get_peft_model(model, SnellConfig(rank=8, sparsity=0.9, target_modules="all-linear"))

Saved are PEFT's two files. An adapted layer `fc1` has `fc1.snell_a` [in, groups * rank] and `fc1.snell_b` [rows, rank],
and the scalars of its kernel, `fc1.snell_alpha` [groups] and so on; a parameter of `parameters_to_save`, `cls_token`,
has `parametrizations.cls_token.0.snell_value`. A process that loads an adapter imports this first.

PEFT's types are a closed enum that its registry insists on, so SNELL gets an enum of its own, equal to the string that
adapter_config.json has, and enters the mappings that PEFT exports.
"""

from __future__ import annotations

try:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    from snell_dist.peft.config import SnellConfig, SnellType
    from snell_dist.peft.layers import PREFIX, SnellLayer, SnellLinear, SnellParameter
    from snell_dist.peft.model import SnellModel
except ImportError as error:
    raise ImportError(f"snell_dist.peft needs PEFT ({error}): pip install 'snell_dist[peft]'") from error

__all__ = ["SnellConfig", "SnellLayer", "SnellLinear", "SnellModel", "SnellParameter"]

PEFT_TYPE_TO_CONFIG_MAPPING[SnellType.SNELL] = SnellConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[SnellType.SNELL] = SnellModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[SnellType.SNELL] = PREFIX  # type: ignore[index]
