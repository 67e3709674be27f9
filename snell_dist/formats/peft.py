"""PEFT: `PeftModel.from_pretrained(MODEL, FOLDER)` on timm's model; `import snell_dist.peft` comes first for SNELL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from snell_dist.config import UserError

if TYPE_CHECKING:
    import torch

    from snell_dist.finished import Finished
    from snell_dist.formats import Served

ABOUT = "PEFT's adapter_config.json and adapter_model.safetensors, for timm's model; the base stays apart"
LIBRARY = "peft"
CLIP = "open_clip's attention computes past any adapter: choose peft_hf, for Transformers' CLIP"


def check(run: Finished) -> None:
    if run.config.backbone.name == "clip":
        raise UserError(f"--format peft: {run.folder}: {CLIP}")


def write(run: Finished, folder: Path, dtype: torch.dtype) -> None:
    """The factors stay float32, whatever the dtype: they are small, and a delta is made of them."""
    from snell_dist.formats import _peft_names

    config, state = _peft_names.to_peft(run.backbone().model, run.tensors)
    _peft_names.write(folder, config, state)


def usage(run: Finished) -> str:
    return """\
import snell_dist.peft  # tells PEFT of SNELL
from peft import PeftModel

# base: timm's model of the table below, with these weights
model = PeftModel.from_pretrained(base, ".").eval()"""


def reload(run: Finished, folder: Path) -> Served:
    from peft import PeftModel

    from snell_dist.formats import Served

    base = run.base()
    adapted = replace(base, model=PeftModel.from_pretrained(base.model, str(folder)).eval())
    logits = run.config.task.logits(adapted, run.classes)
    return Served(logits, run.prepare, run.classes, base.image_shape, about="PEFT on timm's model")
