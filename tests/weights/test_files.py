"""Files and folders: read by content, refused in one line, and never executed."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import published as pub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file

from snell_dist import weights
from snell_dist.config import UserError

Save = Callable[[Path], None]
MODEL = pub.randomised(pub.vit())
STATE = MODEL.state_dict()
CONTAINERS: dict[str, Save] = {
    "safetensors": lambda path: save_file(STATE, path),
    "npz": lambda path: path.write_bytes(_npz(pub.jax_vit(MODEL))),
    "torch": lambda path: torch.save({"model": STATE}, path),
    "older torch": lambda path: torch.save({"state_dict": STATE}, path, _use_new_zipfile_serialization=False),
}


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def refusal(source: str | Path) -> str:
    """The one line, which names the key and the source."""
    with pytest.raises(UserError) as caught:
        weights.read(source)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"backbone.weights = {str(source)!r}: ")
    return str(caught.value)


def same(found: weights.Published) -> bool:
    return all(torch.equal(found.state[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("name", ["w.safetensors", "ViT-B_16.npz", "swin_base.pth", "a.pth.tar", "no_suffix", "x.txt"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_name_of_a_file_means_nothing(container: str, name: str, tmp_path: Path) -> None:
    CONTAINERS[container](tmp_path / name)
    found = weights.read(tmp_path / name)
    assert same(found)
    assert found.source == str(tmp_path / name)
    assert found.layout == ("JAX ViT" if container == "npz" else "timm or open_clip")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_that_is_cut_off_is_refused_by_name(container: str, share: float, tmp_path: Path) -> None:
    file = tmp_path / "w.bin"
    CONTAINERS[container](file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    assert "w.bin is " in refusal(file)


def test_a_damaged_array_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.npz"
    CONTAINERS["npz"](file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    file.write_bytes(bytes(content))
    assert "damaged" in refusal(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"epoch,loss\n1,2\n", "is text (allowed: safetensors, npz, torch)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run git lfs pull"),
        (b'{"hidden_size": 768}', "no index of files"),
        (b"\x1f\x8b\x08\x00 packed", "is no checkpoint"),
        (b"\x89PNG\r\n\x1a\n", "is no checkpoint"),
    ],
)
def test_a_file_of_another_kind_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    assert said in refusal(tmp_path / "w.pth")


class Hostile:
    """Writes a file where it is unpickled carelessly."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["zip", "older", "plain", "npz"])
def test_code_in_a_pickle_is_refused_and_not_run(form: str, tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "w.pth"
    content = {"hook": Hostile(marker), "model": STATE}
    if form == "npz":
        file.write_bytes(_npz({"embedding/kernel": np.array([Hostile(marker)], dtype=object)}))
        marker.unlink(missing_ok=True)
    elif form == "plain":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    said = refusal(file)
    assert not marker.exists()
    assert "more than plain arrays" in said if form == "npz" else "asks to run posix.system" in said


def test_a_torchscript_program_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "ViT-B-32.pt"))
    assert "is a TorchScript program, which is never run" in refusal(tmp_path / "ViT-B-32.pt")


def test_another_zip_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("model.safetensors", "x")
    assert "unpack it" in refusal(tmp_path / "w.zip")


def test_options_saved_beside_the_weights_do_no_harm(tmp_path: Path) -> None:
    torch.save({"model": STATE, "args": argparse.Namespace(lr=1e-3), "epoch": 3}, tmp_path / "w.pth")
    assert same(weights.read(tmp_path / "w.pth"))


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "encoder.", "model.", "module.backbone.", "_orig_mod."])
def test_a_prefix_that_most_names_share_is_taken_off(prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{name}": tensor for name, tensor in STATE.items() if not name.startswith("head.")}
    torch.save({"state_dict": state | {n: STATE[n] for n in ("head.weight", "head.bias")}}, tmp_path / "w.pth")
    assert same(weights.read(tmp_path / "w.pth"))


def test_averaged_weights_come_before_the_last_ones(tmp_path: Path) -> None:
    last = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    torch.save({"state_dict": last, "state_dict_ema": STATE, "optimizer": {"state": {}}}, tmp_path / "w.pth")
    assert same(weights.read(tmp_path / "w.pth"))


def test_what_has_no_tensors_or_an_unknown_layout_is_refused_with_its_names(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "w.pth")
    assert "it holds epoch, lr" in refusal(tmp_path / "w.pth")
    torch.save([1, 2], tmp_path / "w.pth")
    assert "it holds no dictionary" in refusal(tmp_path / "w.pth")
    save_file({"conv_proj.weight": torch.ones(1), "class_token": torch.ones(1)}, tmp_path / "w.pth")
    said = refusal(tmp_path / "w.pth")
    assert "not a layout that is known; first keys: class_token, conv_proj.weight" in said
    assert "MAE" in said and "Hugging Face CLIP" in said


def test_a_file_that_only_looks_like_a_layout_is_refused(tmp_path: Path) -> None:
    arrays = pub.jax_vit(MODEL)
    key = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"
    lacking = {name: array for name, array in arrays.items() if name != key}
    np.savez(tmp_path / "w.npz", **lacking)
    assert "lacks blocks.1.attn.k.weight, which a file of layout JAX ViT has" in refusal(tmp_path / "w.npz")
    np.savez(tmp_path / "w.npz", **(arrays | {key: np.zeros((3, 1, 1), np.float32)}))
    assert "looks like JAX ViT, but its tensors have other shapes" in refusal(tmp_path / "w.npz")


@pytest.mark.parametrize("name", ["model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"])
def test_a_folder_is_read_by_the_usual_names(name: str, tmp_path: Path) -> None:
    (CONTAINERS["safetensors"] if name.endswith("safetensors") else CONTAINERS["torch"])(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert same(weights.read(tmp_path))


def sharded(folder: Path) -> dict[str, str]:
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(STATE)}
    for file in set(names.values()):
        save_file({name: STATE[name] for name in STATE if names[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


def test_a_folder_of_shards_is_read_as_one(tmp_path: Path) -> None:
    names = sharded(tmp_path)
    assert same(weights.read(tmp_path))
    assert same(weights.read(tmp_path / "model.safetensors.index.json"))
    (tmp_path / min(names.values())).unlink()
    assert "names model-00001-of-00002.safetensors, which is not there" in refusal(tmp_path)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    save_file(STATE, tmp_path / "outside.safetensors")
    index = {"weight_map": {"cls_token": "../outside.safetensors"}}
    (tmp_path / "inside" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names outside.safetensors, which is not there" in refusal(tmp_path / "inside")


def test_what_does_not_exist_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    CONTAINERS["torch"](tmp_path / "mae_pretrain.pth")
    assert "did you mean 'mae_pretrain.pth'?" in refusal(tmp_path / "mae_pretrian.pth")
    assert "for one on the Hugging Face hub say hub:google/vit-base" in refusal("google/vit-base")
    (tmp_path / "empty").mkdir()
    assert "the folder has none of model.safetensors" in refusal(tmp_path / "empty")


def test_a_source_is_told_from_a_librarys_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert all(map(weights.is_source, ["hub:a/b", "w.pth", "some/where", "folder", str(tmp_path)]))
    assert not any(map(weights.is_source, ["augreg_in21k", "laion2b_s34b_b79k", "openai"]))


def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[str, str, str | None]]:
    """The hub as a local folder; what is asked of it."""
    asked = []

    def download(repo: str, name: str, revision: str | None = None) -> str:
        asked.append((repo, name, revision))
        if not (folder / name).is_file():
            raise EntryNotFoundError(f"404: no {name}\nsome more lines")
        return shutil.copy(folder / name, folder / f"cached {name}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_the_hub_is_asked_for_safetensors_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, tmp_path)
    CONTAINERS["torch"](tmp_path / "pytorch_model.bin")
    found = weights.read("hub:org/name@v1.0")
    assert same(found) and found.source == "hub:org/name@v1.0"
    assert asked[0] == ("org/name", "model.safetensors", "v1.0") and asked[-1][1] == "pytorch_model.bin"
    (tmp_path / "pytorch_model.bin").unlink()
    sharded(tmp_path)
    assert same(weights.read("hub:org/name"))


def test_a_hub_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, tmp_path)
    assert "the hub gives none of model.safetensors" in refusal("hub:org/name")
    assert "must be hub:ORG/NAME" in refusal("hub:name")

    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network\nand no cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert refusal("hub:org/name").endswith("no network")

    def refused(*_: object, **__: object) -> str:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    assert refusal("hub:org/name").endswith("401 Unauthorized")
