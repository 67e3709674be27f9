"""PEFT on Transformers' model of the same weights, whose q, k and v are layers of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from snell_dist.finished import Finished
    from snell_dist.formats import Served

ABOUT = "PEFT's two files, for Transformers' model of the same base"
LIBRARY = "peft"


def check(run: Finished) -> None:
    from snell_dist.formats import _transformers

    _transformers.of(run)


def write(run: Finished, folder: Path, dtype: torch.dtype) -> None:
    from snell_dist.formats import _peft_names, _separate

    names, model = _base(run)
    tensors = _separate.separated(names, model, run.backbone().model, run.tensors)
    config, state = _peft_names.to_peft(model, tensors)
    _peft_names.write(folder, config, state)


def usage(run: Finished) -> str:
    return """\
import snell_dist.peft  # tells PEFT of SNELL
from peft import PeftModel

# base: Transformers' model of the table below, with these weights
model = PeftModel.from_pretrained(base, ".").eval()"""


def reload(run: Finished, folder: Path) -> Served:
    from peft import PeftModel

    from snell_dist.formats import Served, _transformers
    from snell_dist.formats._zero_shot import ZeroShot

    (_, base), ours = _base(run), run.empty()
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    logits = lambda images: model(pixel_values=images).logits  # noqa: E731
    if ours.tokenize is not None:
        told = ZeroShot(run.classes, ours.templates)
        logits = _transformers.zero_shot_logits(model, told, ours.tokenized(told.captions()))
    return Served(logits, run.prepare, run.classes, ours.image_shape, about="PEFT on Transformers' model")


def _base(run: Finished) -> tuple[Any, Any]:
    from snell_dist.formats import _separate, _transformers

    base = run.base()
    theirs = _transformers.of(run)
    model = getattr(_transformers.library(), theirs.name)(theirs.config).eval()
    names = _separate.Names(run.config.backbone, theirs, model)
    _separate.fill(names, model, base.model.state_dict())
    return names, model
