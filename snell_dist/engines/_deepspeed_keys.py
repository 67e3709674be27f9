"""Which keys of DeepSpeed's JSON a user may pass on: not those that are ours, nor those that DeepSpeed does not know.

DeepSpeed ignores a misspelt key silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snell_dist.config import ConfigError, Problem, first_line, nearest

OWN = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "precision",
    "bf16": "precision",
    "torch_autocast": "precision.compute",
    "activation_checkpointing": "remat",
    "zero_allow_untested_optimizer": "engine",
    "zero_force_ds_cpu_optimizer": "engine",
    "steps_per_print": "train.log_every",
}
OWN_IN_ZERO = {
    "stage": "engine.stage",
    "offload_optimizer": "engine.offload_optimizer",
    "offload_param": "engine.frozen",
}


def check_extra(extra: Mapping[str, Any], config: dict[str, Any]) -> None:
    """ConfigError for keys of `extra` that are ours, and for those that DeepSpeed does not read.

    config: the whole configuration, `extra` included.
    """
    key = "engine.deepspeed_extra"
    problems = [Problem(f"{key}.{k}", f"is ours: say {OWN[k]}") for k in extra if k in OWN]
    inside = extra.get("zero_optimization", {})
    problems += [
        Problem(f"{key}.zero_optimization.{k}", f"is ours: say {OWN_IN_ZERO[k]}") for k in inside if k in OWN_IN_ZERO
    ]
    if problems:
        raise ConfigError(*problems)
    from deepspeed.runtime.config import DeepSpeedConfig

    known = _Asked(config)
    try:
        DeepSpeedConfig(known)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(Problem(key, f"DeepSpeed refuses: {_plain(error)}")) from None
    unknown = [k for k in extra if k not in known.asked]
    if unknown:
        message = "DeepSpeed does not know this key{}"
        raise ConfigError(*(Problem(f"{key}.{k}", message.format(nearest(k, known.asked))) for k in unknown))


class _Asked(dict):
    """A dict that remembers which keys it was asked for: DeepSpeed has no list of the keys that it reads."""

    def __init__(self, content: Mapping[str, Any], asked: set[str] | None = None) -> None:
        super().__init__(content)
        self.asked = set() if asked is None else asked

    def __copy__(self) -> _Asked:
        return _Asked(self, self.asked)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(str(key))
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(str(key))
        return super().__getitem__(key)

    def keys(self) -> _Asked:  # type: ignore[override]
        return self


def _plain(error: Exception) -> str:
    """pydantic says the key in one line and what is wrong in the next."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return first_line(error)
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in errors())
