"""timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`, and from the hub by the same two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snell_dist.config import UserError

if TYPE_CHECKING:
    import torch

    from snell_dist.data import Preprocessing
    from snell_dist.finished import Finished
    from snell_dist.formats import Served

ABOUT = "timm's config.json and model.safetensors, the delta folded in"
FAMILIES = "vit", "swin", "convnext"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
CROP = {"squeeze": (1.0, "squash"), "centre": (224 / 256, "center")}  # timm's crop_pct and crop_mode


def check(run: Finished) -> None:
    if run.config.backbone.name not in FAMILIES:
        raise UserError(f"--format timm: {run.folder} is of open_clip: choose open_clip, hf or onnx")


def write(run: Finished, folder: Path, dtype: torch.dtype) -> None:
    from timm.models._hub import save_config_for_hf

    from snell_dist.finished import Folded
    from snell_dist.tensor_files import stream_tensors

    weights = Folded(run)
    save_config_for_hf(
        run.empty().model,
        str(folder / CONFIG),
        model_config={"label_names": run.classes},
        data_config=_data_config(run.preprocessing),
    )
    stream_tensors(folder / WEIGHTS, weights.shapes_in(dtype), weights)


def _data_config(said: Preprocessing) -> dict[str, Any]:
    crop_pct, crop_mode = CROP[said.resize]
    return {
        "input_size": (said.channels, said.size, said.size), "interpolation": said.interpolation, "mean": said.mean,
        "std": said.std, "crop_pct": crop_pct, "crop_mode": crop_mode,
    }  # fmt: skip


def reload(run: Finished, folder: Path) -> Served:
    return load(folder)


def holds(folder: Path) -> bool:
    file = folder / CONFIG
    return file.is_file() and "architecture" in json.loads(file.read_text())


def load(folder: Path) -> Served:
    import timm
    from timm.data import create_transform, resolve_data_config

    from snell_dist.formats import Prepare, Served

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
