"""Every format against the library that it is for: the run's own logits, names and pictures come back from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import timm
import torch
import transformers
from finished_runs import CLASSES, MEAN, STD, finish
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from snell_dist import finished, formats
from snell_dist.config import Plugin, UserError

TOLERANCE = 1e-6  # relative, of logits
SMALL = {name: {"name": name, **Plugin("backbones").find(name).smallest} for name in Plugin("backbones").names()}
VIT, CLIP = SMALL["vit"], SMALL["clip"]
BACKBONES: dict[str, dict[str, Any]] = {
    **SMALL,
    "convnextv2": SMALL["convnext"] | {"size": "convnextv2_tiny"},
    "dinov2": VIT | {"size": "vit_small_patch14_dinov2"},
    "registers": VIT | {"size": "vit_small_patch14_reg4_dinov2"},
    "gated": VIT | {"size": "vit_giant_patch14_dinov2", "mlp_ratio": 16 / 3},
    "distilled": VIT | {"size": "deit_tiny_distilled_patch16_224"},
    "eva": VIT | {"size": "eva02_tiny_patch14_224"},
    "siglip": VIT | {"size": "vit_base_patch16_siglip_224"},
    "grey": VIT | {"channels": 1},
    "quickgelu": CLIP | {"size": "ViT-B-32-quickgelu"},
    "two towers": CLIP,
    "two quickgelu": CLIP | {"size": "ViT-B-32-quickgelu"},
    "zeroshot": CLIP | {"head": "zeroshot"},
}
SNELL = {"name": "snell", "rank": 4}
METHODS: dict[str, dict[str, Any]] = {
    "snell": SNELL,
    "some": SNELL | {"targets": ["q", "fc2"]},
    "snella": {"name": "snella", "rank": 4},
    "lora": {"name": "lora", "rank": 4},
    "dora": {"name": "lora", "rank": 4, "dora": True, "targets": ["k", "v", "proj"]},
    "sparse": {"name": "sparse", "criterion": "magnitude"},
    "bias": {"name": "bias"},
    "linear": {"name": "linear"},
    "full": {"name": "full"},
}
FORMATS = {
    "timm": ["vit", "swin", "convnext", "convnextv2", "dinov2", "registers", "gated", "distilled", "eva", "siglip",
             "grey", "clip", "quickgelu"],
    "hf": ["vit", "swin", "convnext", "convnextv2", "dinov2", "registers", "gated", "distilled", "grey", "two towers",
           "two quickgelu"],
    "open_clip": ["two towers", "two quickgelu"],
    "onnx": ["swin", "two towers", "zeroshot"],
}  # fmt: skip
MATRIX = [(name, kind, "snell") for name, kinds in FORMATS.items() for kind in kinds]
MATRIX += [(name, "vit", method) for name in ("timm", "hf") for method in METHODS if method != "snell"]
MATRIX += [("open_clip", "two towers", method) for method in ("some", "lora", "sparse", "bias")]


class Runs:
    """Finished runs, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._logits: dict[Path, Tensor] = {}

    def get(self, kind: str = "vit", method: str | dict[str, Any] = "snell", **options: Any) -> Path:
        label = method if isinstance(method, str) else method["name"]
        folder = self.folder / "-".join([kind, label, *map(str, options.values())]).replace(" ", "_")
        if not folder.exists():
            task = "contrastive" if kind.startswith("two ") else "classify"
            chosen = METHODS[method] if isinstance(method, str) else method
            finish(folder, BACKBONES[kind], chosen, task=task, **options)
        return folder

    def logits(self, folder: Path) -> Tensor:
        """The adapted model's own, delta and weight apart."""
        if folder not in self._logits:
            run = finished.read(folder)
            with torch.no_grad():
                self._logits[folder] = run.config.task.logits(run.backbone(), run.classes)(images(run))
        return self._logits[folder]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def images(run: finished.Finished, count: int = 3) -> Tensor:
    shape = run.preprocessing.channels, run.preprocessing.size, run.preprocessing.size
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))


def far(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def refusal(folder: Path, name: str, to: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        formats.export(folder, name, to, **options)
    assert "\n" not in str(caught.value) and not [p for p in to.parent.iterdir() if p.name.endswith(".tmp")]
    return str(caught.value)


@pytest.mark.parametrize(("name", "kind", "method"), MATRIX, ids=["-".join(case) for case in MATRIX])
def test_what_the_library_reads_is_the_run(runs: Runs, tmp_path: Path, name: str, kind: str, method: str) -> None:
    folder = runs.get(kind, method)
    made = formats.export(folder, name, tmp_path / "out")
    assert made.error is not None and made.error <= TOLERANCE
    assert made.bytes == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    served = formats.serve(tmp_path / "out")
    with torch.no_grad():
        assert far(served.logits(images(finished.read(folder))), runs.logits(folder)) <= TOLERANCE
    assert served.classes == list(CLASSES)


@pytest.mark.parametrize("method", METHODS)
def test_folded_weights_are_the_model_but_for_their_last_bit(runs: Runs, method: str) -> None:
    """In float64 nothing is left but the rounding of the weights that were folded."""
    run = finished.read(runs.get("vit", method))
    adapted, plain = run.backbone().model.double(), run.base().model.double().eval()
    plain.load_state_dict(dict(finished.Folded(run)))
    with torch.no_grad():
        assert far(plain(images(run).double()), adapted(images(run).double())) <= 1e-7


def opened_by_timm(folder: Path) -> Iterator[Any]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    yield model
    assert model.pretrained_cfg["label_names"] == list(CLASSES)
    assert (tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])) == (MEAN, STD)
    assert not {"tag", "license", "hf_hub_id", "url"} & {k for k, v in model.pretrained_cfg.items() if v}


def opened_by_transformers(folder: Path) -> Iterator[Any]:
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    yield lambda pictures: model(pixel_values=pictures).logits
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.label2id == {name: i for i, name in enumerate(CLASSES)}
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (MEAN, STD)


def opened_by_onnxruntime(folder: Path) -> Iterator[Any]:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    yield lambda pictures: torch.cat(
        [torch.from_numpy(session.run(None, {"images": part.numpy()})[0]) for part in pictures.split([1, 2])]
    )
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == list(CLASSES)


OPENED = {"timm": opened_by_timm, "hf": opened_by_transformers, "onnx": opened_by_onnxruntime}


@pytest.mark.parametrize("name", OPENED)
def test_users_of_the_library_need_nothing_of_ours(runs: Runs, tmp_path: Path, name: str) -> None:
    folder = runs.get("registers")
    formats.export(folder, name, tmp_path / "out")
    opened = OPENED[name](tmp_path / "out")
    with torch.no_grad():
        assert far(next(opened)(images(finished.read(folder))), runs.logits(folder)) <= TOLERANCE
    assert next(opened, None) is None


def test_users_of_open_clip_and_of_clip_in_transformers_need_nothing_of_ours(runs: Runs, tmp_path: Path) -> None:
    """Features of pictures and of captions, each from its own library's tokenizer."""
    folder = runs.get("two towers")
    for name in ("open_clip", "hf"):
        formats.export(folder, name, tmp_path / name)
    texts, pictures = ["a photo of a Cat's 2 words!", "b"], images(finished.read(folder))
    first, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open_clip'}")(texts)
    second = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    given = processor(text=texts, images=Image.new("RGB", (40, 50)), padding=True, return_tensors="pt")
    assert [row.tolist()[: mask.sum()] for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True)] \
        == [row.tolist()[: row.argmax() + 1] for row in tokens]  # fmt: skip
    assert first.state_dict().keys() >= {"visual.transformer.resblocks.0.attn.in_proj_weight"}
    with torch.no_grad():
        ours = first.eval()(pictures, tokens)
        theirs = second(pixel_values=pictures, input_ids=given["input_ids"])
    expected = ours[2] * ours[0] @ ours[1].T
    assert far(theirs.logits_per_image, expected) <= TOLERANCE
    assert (prepare.transforms[-1].mean, prepare.transforms[-1].std) == (list(MEAN), list(STD))


@pytest.mark.parametrize("resize", ["squeeze", "centre"])
@pytest.mark.parametrize("kind", ["vit", "grey", "two towers"])
def test_pictures_are_prepared_as_in_training(runs: Runs, tmp_path: Path, kind: str, resize: str) -> None:
    folder = runs.get(kind, resize=resize)
    run = finished.read(folder)
    wave = np.add.outer(np.sin(np.arange(70) / 9), np.cos(np.arange(90) / 7)) * 60 + 127
    picture = Image.fromarray(np.stack([wave, wave[::-1], wave[:, ::-1]], -1).astype(np.uint8))
    expected = run.prepare(picture)
    for name in [name for name in ("timm", "hf", "open_clip") if kind in FORMATS[name]]:
        formats.export(folder, name, tmp_path / name, proven=False)
        found = formats.serve(tmp_path / name).prepare(picture)
        if (name, resize) == ("open_clip", "centre"):  # which it cannot say, and warns of
            assert found.shape == expected.shape
        else:  # pictures of whole numbers: two of them apart
            torch.testing.assert_close(found, expected, rtol=0, atol=2.1 / 255 / min(STD))


@pytest.mark.parametrize("name", ["timm", "hf"])
@pytest.mark.parametrize("kind", ["vit", "convnext", "swin", "registers"])
def test_an_export_is_a_base_of_ours_with_its_classifier(runs: Runs, tmp_path: Path, name: str, kind: str) -> None:
    folder = runs.get(kind)
    formats.export(folder, name, tmp_path / "out", proven=False)
    run = finished.read(folder)
    again = {"weights": str(tmp_path / "out"), "head": "file"}
    model = run.config.task.build(run.config.backbone.model_copy(update=again), run.classes).model.eval()
    with torch.no_grad():
        assert far(model(images(run)), runs.logits(folder)) <= TOLERANCE


@pytest.mark.parametrize("name", ["open_clip", "hf"])
def test_an_export_of_two_towers_is_a_base_of_ours(runs: Runs, tmp_path: Path, name: str) -> None:
    folder = runs.get("two towers")
    formats.export(folder, name, tmp_path / "out", proven=False)
    run = finished.read(folder)
    backbone = run.config.task.build(run.config.backbone.model_copy(update={"weights": str(tmp_path / "out")}), [])
    backbone.model.eval()
    with torch.no_grad():
        assert far(run.config.task.logits(backbone, run.classes)(images(run)), runs.logits(folder)) <= TOLERANCE


@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 3e-2), ("float16", 3e-3)])
@pytest.mark.parametrize("name", ["timm", "hf", "open_clip"])
def test_other_dtypes_are_rounded_once(runs: Runs, tmp_path: Path, name: str, dtype: str, limit: float) -> None:
    folder = runs.get("two towers" if name == "open_clip" else "vit")
    made = formats.export(folder, name, tmp_path / dtype, dtype)
    formats.export(folder, name, tmp_path / "whole", proven=False)
    assert made.error is not None and TOLERANCE < made.error < limit
    (rounded,), (whole,) = ((tmp_path / each).glob("*.safetensors") for each in (dtype, "whole"))
    for key, tensor in load_file(whole).items():
        assert torch.equal(load_file(rounded)[key], tensor.to(getattr(torch, dtype)))


@pytest.mark.parametrize(("kind", "scale"), [("vit", 0.02), ("registers", 0.02), ("swin", 0.1)])
def test_the_proof_sees_one_pair_of_matrices_exchanged(runs: Runs, tmp_path: Path, kind: str, scale: float) -> None:
    """Also where weights are as small as at the start of a training, and attention is nearly even."""
    folder = runs.get(kind, scale=scale)
    formats.export(folder, "timm", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("1.attn.qkv.weight"))
    q, k, v = state[name].chunk(3)
    save_file({**state, name: torch.cat([k, q, v])}, file, {"format": "pt"})
    run = finished.read(folder)
    with pytest.raises(UserError, match="reloaded, its logits differ by"):
        formats.prove(run, lambda: formats.serve(tmp_path / "out"), formats.LIMITS["float32"])


def test_a_merge_is_the_models_own_format(runs: Runs, tmp_path: Path) -> None:
    assert [formats.own(runs.get(kind)) for kind in ("vit", "clip", "two towers")] == ["timm", "timm", "open_clip"]
    formats.export(runs.get("vit"), "timm", tmp_path / "out", proven=False)
    for again in (
        lambda: formats.own(tmp_path / "out"),
        lambda: formats.export(tmp_path / "out", "timm", tmp_path / "b"),
    ):
        with pytest.raises(UserError, match="holds timm's files, whose weights have a delta folded in already"):
            again()
    assert "exists and stays as it is" in refusal(runs.get("vit"), "timm", tmp_path / "out")
    assert "is no run folder" in refusal(tmp_path, "timm", tmp_path / "c")
    assert "did you mean 'timm'?" in refusal(runs.get("vit"), "tim", tmp_path / "c")


def test_a_fused_matrix_is_folded_once_for_the_three_it_becomes(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    fold = finished.Folded.__getitem__
    monkeypatch.setattr(finished.Folded, "__getitem__", lambda self, name: made.append(name) or fold(self, name))
    formats.export(runs.get("vit"), "hf", tmp_path / "out", proven=False)
    assert sorted(made) == sorted(set(made)) and "blocks.0.attn.qkv.weight" in made
    with (tmp_path / "out" / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    del header["__metadata__"]
    assert sorted(header) == sorted(header, key=lambda name: header[name]["data_offsets"])


UNFIT = [
    ("open_clip", "vit", "is of timm: choose timm, hf or onnx"),
    ("open_clip", "clip", "has a classifier and no text tower: choose timm or onnx"),
    ("timm", "two towers", "has two towers: choose open_clip, hf or onnx"),
    ("timm", "zeroshot", "classifies features of length 1, as no ViT of timm: choose onnx"),
    ("hf", "clip", "CLIPForImageClassification averages patches: choose timm or onnx"),
    ("hf", "eva", "Transformers has no equal of eva02_tiny_patch14_224"),
    ("hf", "siglip", "its classifier sees the class token, this one 'map'"),
]


@pytest.mark.parametrize(("name", "kind", "said"), UNFIT, ids=[f"{name}-{kind}" for name, kind, _ in UNFIT])
def test_what_a_library_has_no_model_for_is_refused(
    runs: Runs, tmp_path: Path, name: str, kind: str, said: str
) -> None:
    assert said in refusal(runs.get(kind), name, tmp_path / "out")


def test_parts_that_transformers_lacks_are_named(tmp_path: Path) -> None:
    for size, said in (
        ("vit_base_patch32_clip_224", "ViTForImageClassification has no norm_pre.weight"),
        ("deit3_small_patch16_224", "has pos_embed [1, 17, 24], this model [1, 16, 24]"),
    ):
        folder = finish(tmp_path / size, VIT | {"size": size}, SNELL)
        assert said in refusal(folder, "hf", tmp_path / "out")
    folder = finish(tmp_path / "scaled", SMALL["swin"] | {"window_size": 8}, SNELL)
    assert "SwinForImageClassification has layers.1" in refusal(folder, "hf", tmp_path / "out")


def test_what_no_weight_holds_goes_into_a_graph_alone(runs: Runs, tmp_path: Path) -> None:
    for method in ({"name": "adapter", "rank": 2}, {"name": "prompt", "count": 2}):
        folder = runs.get("vit", method)
        assert "no weight can hold what this method adds" in refusal(folder, "timm", tmp_path / "out")
    made = formats.export(folder, "onnx", tmp_path / "out")
    assert made.error is not None and made.error <= TOLERANCE


@pytest.mark.parametrize("frozen", ["bfloat16", "int8", "nf4"])
def test_a_base_kept_in_fewer_bits_is_folded_as_it_was_kept(tmp_path: Path, frozen: str) -> None:
    """Also layers that nothing adapts."""
    precision = {"compute": "bfloat16", "frozen": frozen}
    folder = finish(tmp_path / "run", VIT, SNELL | {"targets": ["q", "proj"]}, precision=precision)
    made = formats.export(folder, "timm", tmp_path / "out")
    assert made.error is not None and made.error <= TOLERANCE


def test_a_graph_is_of_float32(runs: Runs, tmp_path: Path) -> None:
    said = refusal(runs.get("vit"), "onnx", tmp_path / "out", dtype="bfloat16")
    assert said == "--format onnx: --dtype bfloat16: the graph computes in float32"


def test_another_list_of_classes_is_refused(tmp_path: Path) -> None:
    folder = finish(tmp_path / "run", VIT, SNELL)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"classes": ["a", "b", "c", "d"]}))
    for name in ("timm", "hf", "onnx"):
        said = refusal(folder, name, tmp_path / "out")
        assert said.endswith("adapter.safetensors: has head.bias [3], but config.yaml and 4 classes make [4]")


def test_a_folder_of_other_json_is_no_model(tmp_path: Path) -> None:
    for content in ("[1]", "{", '"architecture"'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match="is no model"):
            formats.serve(tmp_path)


@pytest.mark.parametrize(("name", "missing"), [("hf", "transformers"), ("onnx", "onnxscript"), ("onnx", "onnxruntime")])
def test_a_missing_library_is_one_line(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, missing: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    said = refusal(runs.get("vit"), name, tmp_path / "out")
    assert said == f"--format {name} needs {missing}, which is missing: pip install 'snell_dist[export]'"


def test_transformers_filling_in_is_refused(runs: Runs, tmp_path: Path) -> None:
    formats.export(runs.get("vit"), "hf", tmp_path / "out", proven=False)
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    del state["classifier.bias"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"ViTForImageClassification has missing keys: classifier.bias"):
        formats.serve(tmp_path / "out")
