"""timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`, and from the hub by the same two files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snell_dist.backbones import _timm
from snell_dist.backbones.clip import Clip
from snell_dist.config import UserError
from snell_dist.files import write_atomic
from snell_dist.formats import _json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from snell_dist.data import Preprocessing
    from snell_dist.finished import Finished
    from snell_dist.formats import Served
    from snell_dist.formats._renamed import Publish

ABOUT = "timm's config.json and model.safetensors, the delta folded in"
LIBRARY = "timm"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
CROP = {"squeeze": (1.0, "squash"), "centre": (224 / 256, "center")}  # timm's crop_pct and crop_mode


def check(run: Finished) -> None:
    shapes = run.empty().model.state_dict()
    published = dict(pair for name, tensor in shapes.items() for pair in _publish(run, shapes, shapes)(name, tensor))
    theirs = _model(run)
    wanted = theirs.state_dict()
    for name in published.keys() ^ wanted.keys():
        where = f"timm's {theirs.pretrained_cfg['architecture']}" if name in published else run.folder
        raise UserError(f"--format timm: {where} has no {name}: choose onnx")
    for name, tensor in published.items():
        if tensor.shape != wanted[name].shape:
            shapes_said = f"{name} {list(tensor.shape)}, timm's {list(wanted[name].shape)}"
            raise UserError(f"--format timm: {run.folder} has {shapes_said}: choose onnx")


def write(run: Finished, folder: Path, dtype: torch.dtype) -> None:
    from snell_dist.finished import Folded, in_dtype
    from snell_dist.formats._renamed import Renamed
    from snell_dist.tensor_files import stream_tensors

    write_atomic(folder / CONFIG, json.dumps(_config(_model(run), run), indent=2))
    weights = Folded(run)
    renamed = Renamed(weights, _publish(run, weights, weights.shapes))
    stream_tensors(folder / WEIGHTS, in_dtype(renamed.shapes, dtype), renamed)


def _model(run: Finished) -> Any:
    """timm's, on the meta device. UserError where it has none that computes what the run's does."""
    import torch

    section = run.config.backbone
    if not isinstance(section, Clip):
        return run.empty().model
    if run.config.task.name == "contrastive":
        raise UserError(f"--format timm: {run.folder} has two towers: choose open_clip, hf or onnx")
    if section.head == "zeroshot":
        raise UserError(f"--format timm: {run.folder} classifies features of length 1, as no ViT of timm: choose onnx")
    from snell_dist.formats import _clip_tower

    with torch.device("meta"):
        return _clip_tower.timm_model(section, len(run.classes))


def _publish(run: Finished, weights: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> Publish:
    if isinstance(run.config.backbone, Clip):
        from snell_dist.formats import _clip_tower

        return _clip_tower.publish_from(weights, shapes)
    return _same


def _same(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield name, tensor


def _config(model: Any, run: Finished) -> dict[str, Any]:
    """timm's own tag, licence and sources of these shapes are left out: they are of other weights."""
    kept = "first_conv", "classifier", "fixed_input_size"
    known = {key: model.pretrained_cfg[key] for key in kept if key in model.pretrained_cfg}
    arguments = {key: value for key, value in getattr(model, _timm.TOLD).items() if key != "drop_path_rate"}
    return {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "label_names": run.classes,
        "model_args": arguments,
        "pretrained_cfg": known | _data(run.preprocessing) | {"num_classes": model.num_classes},
    }


def _data(said: Preprocessing) -> dict[str, Any]:
    crop_pct, crop_mode = CROP[said.resize]
    return {
        "input_size": (said.channels, said.size, said.size), "interpolation": said.interpolation, "mean": said.mean,
        "std": said.std, "crop_pct": crop_pct, "crop_mode": crop_mode,
    }  # fmt: skip


def reload(run: Finished, folder: Path) -> Served:
    return load(folder)


def usage(run: Finished) -> str:
    return f'''\
import timm
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()  # from the hub: "hf-hub:ORG/NAME"
prepare = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=model))
logits = model(prepare(Image.open("picture.png").convert("{run.preprocessing.mode}")).unsqueeze(0))
print(model.pretrained_cfg["label_names"][logits.argmax()])'''


def holds(folder: Path) -> bool:
    return "architecture" in _json.read(folder / CONFIG)


def load(folder: Path) -> Served:
    import timm
    from timm.data import create_transform, resolve_data_config

    from snell_dist.data._transforms import Prepare
    from snell_dist.formats import Served

    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
    config = resolve_data_config({}, model=model)
    names = model.pretrained_cfg.get("label_names") or [f"class {i}" for i in range(model.num_classes)]
    return Served(
        logits=model,
        prepare=Prepare(config["input_size"][0], create_transform(**config)),
        classes=list(names),
        image_shape=config["input_size"],
        about=f"timm {model.pretrained_cfg['architecture']}",
        model=model,
    )
