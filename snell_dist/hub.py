"""The Hugging Face hub: an exported folder up, a repository of such files down, through huggingface_hub.

Nothing goes online unless one of the two functions here is called (or `backbone.weights` names weights of the hub).
Only plain data travels: tensors in safetensors, ONNX graphs, JSON, YAML and text. A pickle is neither sent nor
fetched, whatever its name: files of tensors are looked into on both ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from snell_dist.config import UserError, first_line, trouble
from snell_dist.files import check_new, new_folder, sha256, write_atomic

ALLOWED = ".safetensors", ".onnx", ".onnx.data", ".json", ".md", ".yaml", ".yml", ".txt"
PICKLES = ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".h5", ".msgpack"
CARD = "README.md"
ORIGIN = "pulled_from.json"  # which repository, which commit
NAME = re.compile(r"(?P<repo>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>\S+))?")


@dataclass(frozen=True)
class Pushed:
    repository: str
    commit: str  # of the whole upload, which is one
    url: str
    bytes: int


@dataclass(frozen=True)
class Pulled:
    folder: Path
    commit: str
    bytes: int
    left: list[str]  # files of the repository that did not come


def push(folder: Path, repository: str, private: bool = False) -> Pushed:
    """Uploads what `snell export` wrote as one commit, into a repository that is made if need be.

    UserError, and nothing is sent, where the folder holds other things, no token is set, or the client is offline.
    """
    repo, _ = _parsed(repository, revised=False)
    files = _to_send(folder)
    with _said(repo):
        from huggingface_hub import CommitOperationAdd, HfApi, get_token

        if get_token() is None:
            raise UserError(f"{repo}: the hub wants a token: set HF_TOKEN, or log in with `hf auth login`")
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        sent = [CommitOperationAdd(str(file.relative_to(folder).as_posix()), str(file)) for file in files]
        made = api.create_commit(repo, sent, commit_message="Upload by snell hub push")
    return Pushed(repo, made.oid, f"{api.endpoint}/{repo}", sum(file.stat().st_size for file in files))


def _to_send(folder: Path) -> list[Path]:
    """UserError where the folder is not what `snell export` wrote, and nothing else."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is a run; snell export {folder} --format ... --to DIR makes files to share")
    if not (folder / CARD).is_file():
        raise UserError(f"{folder}: has no {CARD}, which snell export writes: is it another folder?")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ORIGIN)
    names = [file.relative_to(folder).as_posix() for file in files]
    wrong = [name for name in names if not name.endswith(ALLOWED) or Path(name).name.startswith(".")]
    if wrong:
        raise UserError(f"{folder}: {_some(wrong)}: only {', '.join(ALLOWED)} are sent; take the others out")
    for file in files:
        _check_tensors(file, file.relative_to(folder).as_posix())
    return files


def pull(repository: str, to: Path) -> Pulled:
    """Fetches `ORG/NAME` or `ORG/NAME@REVISION` into a new folder, whole or not at all, and records the commit.

    Files of other kinds than ALLOWED stay where they are. UserError, and nothing is left behind, where the
    repository is not there, has its weights in pickles alone, or a file is not what the hub says it is.
    """
    repo, revision = _parsed(repository)
    check_new(to)
    with _said(repository):
        from huggingface_hub import HfApi

        api = HfApi()
        told: Any = api.model_info(repo, revision=revision, files_metadata=True)
        wanted = [one for one in told.siblings if one.rfilename.endswith(ALLOWED)]
        left = [one.rfilename for one in told.siblings if not one.rfilename.endswith(ALLOWED)]
        _check_names(repo, [one.rfilename for one in wanted], left)
        with new_folder(to) as place:
            for one in wanted:
                _fetch(api, repo, told.sha, one, place)
            said = {"repository": repo, "revision": revision, "commit": told.sha}
            write_atomic(place / ORIGIN, json.dumps(said, indent=2))
    size = sum(file.stat().st_size for file in to.rglob("*") if file.is_file())
    return Pulled(to, told.sha, size, [name for name in left if not PurePosixPath(name).name.startswith(".git")])


def _check_names(repo: str, wanted: Sequence[str], left: Sequence[str]) -> None:
    astray = [name for name in wanted if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if astray:
        raise UserError(f"{repo}: {_some(astray)}: leads out of the folder, so nothing is fetched")
    if not any(name.endswith((".safetensors", ".onnx")) for name in wanted):
        pickles = [name for name in left if name.endswith(PICKLES)]
        why = f"its weights are in {_some(pickles)}, which may be pickles" if pickles else "it has no weights"
        raise UserError(f"{repo}: {why}: only .safetensors and .onnx are fetched")


def _fetch(api: Any, repo: str, commit: str, told: Any, place: Path) -> None:
    """One file, compared with what the hub says of it."""
    import shutil
    import tempfile

    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=place) as folder:  # the client keeps notes beside its files
        got = Path(api.hf_hub_download(repo, told.rfilename, revision=commit, local_dir=folder))
        size_differs = told.size is not None and got.stat().st_size != told.size
        if size_differs or (told.lfs is not None and sha256(got) != told.lfs.sha256):
            raise UserError(f"{repo}: {told.rfilename}: is not what the hub says it is: fetch it again")
        _check_tensors(got, f"{repo}: {told.rfilename}")
        home = place / told.rfilename
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(got, home)


def _check_tensors(file: Path, name: str) -> None:
    """Whether a file that is called safetensors is one."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError as error:
            raise UserError(f"{name}: is no whole safetensors file: {first_line(error)}") from None


def _parsed(said: str, revised: bool = True) -> tuple[str, str | None]:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    found = NAME.fullmatch(said)
    form = f"must be ORG/NAME{' or ORG/NAME@REVISION' if revised else ''}"
    if found is None or (found["revision"] and not revised):
        raise UserError(f"{said}: {form}")
    try:
        validate_repo_id(found["repo"])
    except HFValidationError as error:
        raise UserError(f"{said}: {form}: {first_line(error)}") from None
    return found["repo"], found["revision"]


@contextmanager
def _said(repository: str) -> Iterator[None]:
    """Everything that the hub's client says, in one line."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repository}: HF_HUB_OFFLINE is set, so nothing goes online: unset it")
    try:
        yield
    except UserError:
        raise
    except errors.HfHubHTTPError as error:
        raise UserError(f"{repository}: {_refusal(error)}") from None
    except Exception as error:  # those of its transport have no class that outlives a version
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise trouble(error.filename or repository, error) from None
        raise UserError(f"{repository}: {constants.ENDPOINT} does not answer: {first_line(error)}") from None


def _refusal(error: Any) -> str:
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return "is gated: accept its terms on its page, and set a token that may read it"
    if isinstance(error, errors.RevisionNotFoundError):
        return "no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or a private one that your token may not see"
    if status in (401, 403):
        return f"the hub refuses ({status}): may your token write there?"
    return f"the hub answers {status}: {first_line(error)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
