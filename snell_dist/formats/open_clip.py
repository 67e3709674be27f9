"""open_clip: `open_clip.create_model_from_pretrained("local-dir:FOLDER")`, and from the hub by the same two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snell_dist import log
from snell_dist.config import UserError
from snell_dist.files import write_atomic
from snell_dist.formats import _zero_shot
from snell_dist.formats._zero_shot import ZeroShot

if TYPE_CHECKING:
    import torch

    from snell_dist.data import Preprocessing
    from snell_dist.finished import Finished
    from snell_dist.formats import Served

ABOUT = "open_clip_config.json and open_clip_model.safetensors: both towers, the delta folded in"
LIBRARY = "open_clip"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def check(run: Finished) -> None:
    if run.config.backbone.name != "clip":
        raise UserError(f"--format open_clip: {run.folder} is of timm: choose timm, hf or onnx")
    if run.config.task.name != "contrastive":
        raise UserError(f"--format open_clip: {run.folder} has a classifier and no text tower: choose timm or onnx")


def write(run: Finished, folder: Path, dtype: torch.dtype) -> None:
    from snell_dist.backbones.clip import Clip
    from snell_dist.finished import Folded, in_dtype
    from snell_dist.formats._renamed import Renamed
    from snell_dist.tensor_files import stream_tensors

    section = run.config.backbone
    assert isinstance(section, Clip)
    said = {"model_cfg": section.settings(), "preprocess_cfg": _preprocess(run.preprocessing)}
    write_atomic(folder / CONFIG, json.dumps(said, indent=2))
    _zero_shot.write(folder, ZeroShot(run.classes, section.templates))
    tokenizer = section.tokenizer()
    if hasattr(tokenizer, "save_pretrained"):  # one that open_clip does not ship
        tokenizer.save_pretrained(folder)
    renamed = Renamed(Folded(run), lambda name, tensor: iter([(section.library_name(name), tensor)]))
    stream_tensors(folder / WEIGHTS, in_dtype(renamed.shapes, dtype), renamed)


def _preprocess(said: Preprocessing) -> dict[str, Any]:
    if said.resize == "centre":
        about = f"open_clip resizes to the {said.size} pixels that it crops, and the run a seventh beyond"
        log.warn(f"--format open_clip: pictures will show a little more at the edges: {about}")
    mode = {"squeeze": "squash", "centre": "shortest"}[said.resize]
    return {"mean": said.mean, "std": said.std, "interpolation": said.interpolation, "resize_mode": mode}


def reload(run: Finished, folder: Path) -> Served:
    return load(folder)


def usage(run: Finished) -> str:
    return """\
import json, open_clip
from PIL import Image

model, prepare = open_clip.create_model_from_pretrained("local-dir:.")  # from the hub: "hf-hub:ORG/NAME"
told = json.load(open("zero_shot.json"))
tokens = open_clip.get_tokenizer("local-dir:.")([told["templates"][0].format(name) for name in told["classes"]])
image = model.encode_image(prepare(Image.open("picture.png")).unsqueeze(0), normalize=True)
print(told["classes"][(image @ model.encode_text(tokens, normalize=True).T).argmax()])"""


def holds(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def load(folder: Path) -> Served:
    """UserError where the classes that it is to tell apart are not there."""
    import open_clip

    from snell_dist.formats import Served

    told = _zero_shot.read(folder)
    if told is None:
        raise UserError(f"{folder}: has no {_zero_shot.FILE}, which names the classes and the captions of each")
    model: Any
    model, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(told.captions())
    height, width = model.visual.image_size
    return Served(
        logits=told.logits(
            lambda images: model.encode_image(images, normalize=True),
            lambda tokens: model.encode_text(tokens, normalize=True),
            tokens,
            model.logit_scale.exp(),
        ),
        prepare=prepare,
        classes=told.classes,
        image_shape=(3, height, width),
        about="open_clip",
        model=model,
    )
