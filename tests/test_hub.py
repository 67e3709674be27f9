"""Push and pull with huggingface_hub's own client, against a hub on the loopback."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import hub_server
import pytest
import torch
from conftest import ENVIRONMENT, snell
from hub_server import TOKEN, Hub, Repository
from safetensors.torch import save, save_file

import snell_dist
from snell_dist import formats, hub
from snell_dist.config import UserError

Snell = Callable[..., CompletedProcess[str]]
TENSORS = save({"w": torch.arange(3.0)})


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub_server.running() as running:
        yield running


@pytest.fixture
def online(server: Hub, tmp_path: Path) -> Snell:
    """`snell hub ...` in a process of its own, whose hub is the server; keyword arguments are variables."""
    known = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    known |= {"HF_TOKEN": TOKEN, "no_proxy": "127.0.0.1"}

    def run(*words: str | Path, **variables: str) -> CompletedProcess[str]:
        return snell("hub", *words, env=ENVIRONMENT | known | variables, cwd=tmp_path)

    server.asked.clear()
    return run


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("hub") / "timm"
    formats.export(finished, "timm", to)
    return to


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def line(done: CompletedProcess[str]) -> str:
    """The one line that a refused command says."""
    assert (done.returncode, done.stdout) == (2, ""), done
    [said] = done.stderr.splitlines()
    return said.removeprefix("snell: ")


def test_what_goes_up_comes_down_the_same_at_a_pinned_commit(
    online: Snell, server: Hub, exported: Path, tmp_path: Path
) -> None:
    done = online("push", exported, "me/digits", "--private")
    assert done.returncode == 0, done.stderr
    repository = server.repositories["me/digits"]
    [(commit, files)] = repository.commits.items()
    assert repository.private
    assert files == contents(exported)
    assert done.stdout.startswith(f"{server.address}/me/digits: ")
    assert commit in done.stdout
    assert "POST /api/validate-yaml" in server.asked, "the hub's own check of the card"

    second = repository.commit({"README.md": b"---\n{}\n---\nnew"})
    newest, first = (
        online("pull", "me/digits", "--to", "new"),
        online("pull", f"me/digits@{commit}", "--to", "deep/old"),
    )
    assert newest.returncode == first.returncode == 0, newest.stderr + first.stderr
    got = contents(tmp_path / "deep/old")
    told = json.loads(got.pop("pulled_from.json"))
    assert got == contents(exported)
    assert told == {"repository": "me/digits", "revision": commit, "commit": commit}
    assert json.loads((tmp_path / "new/pulled_from.json").read_text())["commit"] == second
    assert (tmp_path / "new/README.md").read_bytes().endswith(b"new")
    assert snell_dist.load(tmp_path / "new", device="cpu").classes == ["five", "six", "seven", "eight", "nine"]

    again = online("push", tmp_path / "deep/old", "me/copy")
    assert again.returncode == 0, again.stderr
    assert list(server.repositories["me/copy"].commits.values()) == [contents(exported)], "not where it was pulled from"
    assert (
        line(online("pull", "me/digits", "--to", "new")) == "--to new: exists and stays as it is; choose another name"
    )


def test_pickles_and_programs_stay_where_they_are(online: Snell, server: Hub, tmp_path: Path) -> None:
    evil = pickle.dumps(print)
    plain = {"model.safetensors": TENSORS, "config.json": b"{}", "sub/merges.txt": b"a b", ".gitattributes": b"*"}
    repository = Repository()
    repository.commit(plain | {"pytorch_model.bin": evil, "modeling.py": b"1/0"})
    server.repositories["them/mixed"] = repository
    done = online("pull", "them/mixed", "--to", "mixed")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("; not fetched: pytorch_model.bin, modeling.py\n")
    assert contents(tmp_path / "mixed").keys() == {
        "model.safetensors", "config.json", "sub/merges.txt", "pulled_from.json",
    }  # fmt: skip
    assert not [request for request in server.asked if ".bin" in request or ".py" in request]


@pytest.mark.parametrize(
    ("files", "tampered", "said"),
    [
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, {},
         "its weights are in pytorch_model.bin, which may be pickles: only .safetensors and .onnx are fetched"),
        ({"config.json": b"{}"}, {}, "it has no weights: only .safetensors and .onnx are fetched"),
        ({"a.json": b"{}", "model.safetensors": pickle.dumps(print)}, {},
         "model.safetensors: is no whole safetensors file: "),
        ({"model.safetensors": TENSORS}, {"model.safetensors": TENSORS[:-1] + b"!"},
         "model.safetensors: is not what the hub says it is: fetch it again"),
        ({"../up.json": b"{}", "model.safetensors": TENSORS}, {},
         "../up.json: leads out of the folder, so nothing is fetched"),
    ],
    ids=["pickles alone", "no weights", "a pickle by another name", "altered on the way", "a name that leads out"],
)  # fmt: skip
def test_a_pull_is_whole_or_leaves_nothing(
    files: dict[str, bytes], tampered: dict[str, bytes], said: str, online: Snell, server: Hub, tmp_path: Path
) -> None:
    repository = Repository()
    repository.commit(files)
    server.repositories["them/bad"], server.tampered = repository, tampered
    try:
        assert line(online("pull", "them/bad", "--to", "there/bad")).startswith(f"them/bad: {said}")
    finally:
        server.tampered = {}
    assert not list((tmp_path / "there").rglob("*"))
    assert not (tmp_path / "up.json").exists()


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (["pull", "them/nothing", "--to", "x"], {}, "them/nothing: no such repository, or a private one that your"),
        (["pull", "them/there@v7", "--to", "x"], {}, "them/there@v7: no such revision"),
        (["pull", "them/secret", "--to", "x"], {"HF_TOKEN": ""}, "them/secret: no such repository, or a private one"),
        (["pull", "digits", "--to", "x"], {}, "digits: must be ORG/NAME or ORG/NAME@REVISION"),
        (["pull", "them/a--b", "--to", "x"], {}, "them/a--b: must be ORG/NAME or ORG/NAME@REVISION: "),
        (["pull", "them/there", "--to", "x"], {"HF_HUB_OFFLINE": "1"}, "them/there: HF_HUB_OFFLINE is set, so nothing"),
        (["pull", "them/there", "--to", "x"], {"HF_ENDPOINT": "http://127.0.0.1:9"},
         "them/there: http://127.0.0.1:9 does not answer: "),
        (["push", "EXPORTED", "me/x"], {"HF_TOKEN": ""}, "me/x: the hub wants a token: set HF_TOKEN, or log in"),
        (["push", "EXPORTED", "me/x"], {"HF_TOKEN": "wrong"}, "me/x: the hub refuses (401): may your token write"),
        (["push", "EXPORTED", "forbidden/x"], {}, "forbidden/x: the hub refuses (403): may your token write there?"),
        (["push", "EXPORTED", "me/x@v1"], {}, "me/x@v1: must be ORG/NAME"),
        (["push", "EXPORTED", "me/x"], {"HF_HUB_OFFLINE": "1"}, "me/x: HF_HUB_OFFLINE is set, so nothing goes online"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(
    words: list[str], variables: dict[str, str], said: str, online: Snell, server: Hub, exported: Path, tmp_path: Path
) -> None:
    there, secret = Repository(), Repository(private=True)
    for repository in (there, secret):
        repository.commit({"model.safetensors": TENSORS})
    server.repositories |= {"them/there": there, "them/secret": secret}
    done = online(*(exported if word == "EXPORTED" else word for word in words), **variables)
    assert line(done).startswith(said)
    assert not (tmp_path / "x").exists()
    if "HF_HUB_OFFLINE" in variables:
        assert server.asked == []


def folder_with(tmp_path: Path, **files: Any) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in ({"README.md": b"---\n{}\n---\n"} | files).items():
        (folder / name).write_bytes(content)
    return folder


def test_only_what_was_exported_is_sent(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a run; snell export .* makes files to share"):
        hub.push(finished, "me/x")
    with pytest.raises(UserError, match="no such folder"):
        hub.push(tmp_path / "nowhere", "me/x")
    with pytest.raises(UserError, match=r"has no README\.md, which snell export writes"):
        hub.push(tmp_path, "me/x")
    folder = folder_with(
        tmp_path, **{"model.bin": b"", "train.py": b"", ".env": b"", "model.safetensors": b"\x80\x04."}
    )
    with pytest.raises(UserError, match=r"folder: \.env, model\.bin, train\.py: only \.safetensors, .* are sent"):
        hub.push(folder, "me/x")
    for name in ("model.bin", "train.py", ".env"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"^model\.safetensors: is no whole safetensors file"):
        hub.push(folder, "me/x")
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    assert [file.name for file in hub._to_send(folder)] == ["README.md", "model.safetensors"]
