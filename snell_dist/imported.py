"""From PEFT to a run of ours: what was trained there, as a complete run folder that everything here takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from snell_dist import job, log
from snell_dist.config import Loaded, UserError, check
from snell_dist.files import check_new
from snell_dist.run_config import Run
from snell_dist.train import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from snell_dist.build import Built


def bring(loaded: Loaded[Run], folder: Path, to: Path, out: Path) -> Outcome:
    """A PEFT adapter (SNELL or LoRA) on the base and the data of a configuration, whose method it replaces; tested.

    UserError where the adapter is of another model, another base or other classes.
    """
    check_new(to)
    try:
        from snell_dist.formats import _adopted
    except ImportError as error:
        raise UserError(str(error)) from None

    config = loaded.config
    classes = len(config.data.load(config.protocol.all_labelled).classes)
    adopted = _adopted.read(folder, config, classes)
    log.info(f"method of {folder}: {adopted.method.model_dump_json(exclude={'targets', 'also_train'})}")

    def trained(built: Built) -> Mapping[str, Tensor]:
        adopted.check_base(folder, built.engine.model)
        return adopted.tensors

    settled = check(config.model_dump() | {"method": adopted.method.model_dump()}, Run)
    return job.adopt(replace(loaded, config=settled), to, out, str(folder), trained)
