"""Transformers: `AutoModelForImageClassification.from_pretrained(FOLDER)`, or `CLIPModel` for both towers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snell_dist.backbones.clip import Clip
from snell_dist.config import UserError
from snell_dist.files import write_atomic
from snell_dist.formats import _json, _transformers, _zero_shot
from snell_dist.formats._zero_shot import ZeroShot

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from snell_dist.backbones import BackboneSection
    from snell_dist.data import Preprocessing
    from snell_dist.finished import Finished
    from snell_dist.formats import Served

ABOUT = "Transformers' config.json, preprocessor_config.json and model.safetensors, the delta folded in"
LIBRARY = "transformers"
CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
START, END = "<|startoftext|>", "<|endoftext|>"


def check(run: Finished) -> None:
    _transformers.of(run)


def write(run: Finished, folder: Path, dtype: torch.dtype) -> None:
    from snell_dist.finished import Folded, in_dtype
    from snell_dist.formats._renamed import Renamed
    from snell_dist.tensor_files import stream_tensors

    theirs, backbone = _transformers.of(run), run.empty()
    if backbone.tokenize is not None:
        _zero_shot.write(folder, ZeroShot(run.classes, backbone.templates))
        _write_tokenizer(folder, run.config.backbone)
    theirs.config.save_pretrained(folder)
    write_atomic(folder / PROCESSOR, json.dumps(_processor(run.preprocessing), indent=2))
    library_name = run.config.backbone.library_name
    renamed = Renamed(Folded(run), lambda name, tensor: theirs.publish(library_name(name), tensor))
    stream_tensors(folder / WEIGHTS, in_dtype(renamed.shapes, dtype), renamed)


def _processor(said: Preprocessing) -> dict[str, Any]:
    """The processor of CLIP is that which can both squeeze and crop."""
    from snell_dist.data._transforms import shorter_side

    square = {"height": said.size, "width": said.size}
    crops = said.resize == "centre"
    return {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "resample": RESAMPLE[said.interpolation],
        "size": {"shortest_edge": shorter_side(said.size)} if crops else square, "do_center_crop": crops,
        "crop_size": square, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(said.mean), "image_std": list(said.std), "do_convert_rgb": said.channels == 3,
    }  # fmt: skip


def _write_tokenizer(folder: Path, section: BackboneSection) -> None:
    """CLIP's byte pairs, which open_clip ships, in the files of CLIPTokenizer; any other is Transformers' already."""
    assert isinstance(section, Clip)
    ours = section.tokenizer()
    if hasattr(ours, "save_pretrained"):
        ours.save_pretrained(folder)
        return
    special = {ours.sot_token_id: START, ours.eot_token_id: END}
    vocabulary = {special.get(i, token): i for token, i in ours.encoder.items()}
    merges = sorted(ours.bpe_ranks, key=ours.bpe_ranks.get)
    write_atomic(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_atomic(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    said = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": ours.context_length, "do_lower_case": True,
        "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END,
    }  # fmt: skip
    write_atomic(folder / "tokenizer_config.json", json.dumps(said, indent=2))


def reload(run: Finished, folder: Path) -> Served:
    return load(folder)


def usage(run: Finished) -> str:
    if run.config.task.name == "contrastive":
        return """\
import json
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model, prepare, tokenizer = (one.from_pretrained(".") for one in (AutoModel, AutoImageProcessor, AutoTokenizer))
told = json.load(open("zero_shot.json"))
texts = tokenizer([told["templates"][0].format(name) for name in told["classes"]], padding=True, return_tensors="pt")
logits = model(**prepare(Image.open("picture.png"), return_tensors="pt"), **texts).logits_per_image
print(told["classes"][logits.argmax()])"""
    return f'''\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model, prepare = (one.from_pretrained(".") for one in (AutoModelForImageClassification, AutoImageProcessor))
picture = Image.open("picture.png").convert("{run.preprocessing.mode}")
logits = model(**prepare(picture, return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())])'''


def holds(folder: Path) -> bool:
    return "architectures" in _json.read(folder / CONFIG)


@dataclass(frozen=True)
class _Processed:
    processor: Any

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        return self.processor(images=picture, return_tensors="pt")["pixel_values"][0]


def load(folder: Path) -> Served:
    """UserError where Transformers fills in what the files lack."""
    from snell_dist import weights
    from snell_dist.data._transforms import Prepare
    from snell_dist.formats import Served

    transformers = _transformers.library()
    name = _json.read(folder / CONFIG)["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        odd = [str(key) for key in report[kind] if not str(key).endswith(weights.BUFFERS)]
        if odd:
            raise UserError(f"{folder}: {name} has {kind.replace('_', ' ')}: {', '.join(odd)}")
    model = model.float().eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    said, told = model.config, _zero_shot.read(folder)
    if told is None:
        classes = [said.id2label[i] for i in range(said.num_labels)]
        logits = lambda images: model(pixel_values=images).logits  # noqa: E731
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(told.captions(), padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        classes, logits = told.classes, _transformers.zero_shot_logits(model, told, tokens)
    channels = getattr(said, "vision_config", said).num_channels
    size = processor.crop_size
    return Served(
        logits=logits,
        prepare=Prepare(channels, _Processed(processor)),
        classes=classes,
        image_shape=(channels, size["height"], size["width"]),
        about=f"transformers {name}",
        model=model,
    )  # fmt: skip
