"""ONNX: `onnxruntime.InferenceSession("FOLDER/model.onnx")`, from images [batch, C, H, W] to logits [batch, classes].

Classes and how pictures are prepared are the file's metadata. What no weight can hold (prompts, adapters) is in the
graph. A model of two towers becomes its image tower and the directions of the run's classes.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snell_dist.config import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from snell_dist.finished import Finished
    from snell_dist.formats import Served

ABOUT = "one graph in ONNX, for onnxruntime and others; any number of images at a time"
LIBRARY = "onnx"
FILE = "model.onnx"
OPSET = 18
INPUT, OUTPUT = "images", "logits"
LARGEST = 2**31 - 2**20  # bytes of weights within the file, which is a protocol buffer; beyond that, beside it


def check(run: Finished) -> None:
    _library("onnxscript"), _library("onnxruntime")


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"--format onnx needs {name}, which is missing: pip install 'snell_dist[export]'") from None


def write(run: Finished, folder: Path, dtype: torch.dtype) -> None:
    import torch

    if dtype != torch.float32:
        raise UserError(f"--format onnx: --dtype {str(dtype).removeprefix('torch.')}: the graph computes in float32")
    backbone, model = _model(run)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    images = torch.zeros(2, *backbone.image_shape)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            model, (images,), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    if shape is None or isinstance(shape[0], int):
        raise UserError(f"--format onnx: {run.folder}: its graph would be of {len(images)} images and no other number")
    program.model.metadata_props.update(
        {"classes": json.dumps(run.classes), "preprocessing": json.dumps(asdict(run.preprocessing))}
    )
    program.save(folder / FILE, external_data=size > LARGEST)


def _model(run: Finished) -> tuple[Any, nn.Module]:
    """The backbone, and a module from images to logits: plain, as far as weights can hold the method's change."""
    from torch import nn

    from snell_dist import methods

    backbone = run.backbone()
    if run.config.method.mergeable:
        methods.merge(backbone.model)
    if run.config.task.name == "classify":
        return backbone, backbone.model
    from snell_dist.tasks.contrastive import captions_of, class_directions

    towers: Any = backbone.model
    directions = class_directions(lambda tokens: towers(None, tokens)[1], captions_of(backbone, run.classes))

    class ImageTower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = towers.visual
            self.register_buffer("scaled", towers.logit_scale.exp() * directions.t())

        def forward(self, images: Tensor) -> Tensor:
            from torch.nn.functional import normalize

            return normalize(self.visual(images), dim=-1) @ self.get_buffer("scaled")

    return backbone, ImageTower().eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its own steps."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def reload(run: Finished, folder: Path) -> Served:
    return load(folder)


def usage(run: Finished) -> str:
    said = run.preprocessing
    return f"""\
import json, numpy, onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
told = session.get_modelmeta().custom_metadata_map  # "preprocessing" says how pictures become images
images = numpy.zeros((1, {said.channels}, {said.size}, {said.size}), "float32")
logits = session.run(["logits"], {{"images": images}})[0]
print(json.loads(told["classes"])[logits[0].argmax()])"""


def holds(folder: Path) -> bool:
    return (folder / FILE).is_file()


def load(folder: Path) -> Served:
    from snell_dist.data import Preprocessing, _transforms
    from snell_dist.formats import Served

    session = _library("onnxruntime").InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    told = session.get_modelmeta().custom_metadata_map
    preprocessing = Preprocessing(**json.loads(told["preprocessing"]))
    channels, size = preprocessing.channels, preprocessing.size
    return Served(
        logits=_run(session),
        prepare=_transforms.Prepare(channels, _transforms.plain(preprocessing)),
        classes=json.loads(told["classes"]),
        image_shape=(channels, size, size),
        about="onnxruntime",
    )


def _run(session: Any) -> Callable[[Tensor], Tensor]:
    import torch

    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])
