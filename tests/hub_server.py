"""A small Hugging Face hub on this machine's loopback: what huggingface_hub's client calls to make a repository, to
commit to it and to read it, with files of tensors over the LFS protocol. Repositories are in memory.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
LARGE = ".safetensors", ".onnx", ".bin"


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by their hash, in order

    def commit(self, changed: dict[str, bytes]) -> str:
        before = list(self.commits.values())[-1] if self.commits else {}
        name = hashlib.sha1(f"{len(self.commits)} {sorted(changed)}".encode()).hexdigest()
        self.commits[name] = before | changed
        return name

    def at(self, revision: str) -> str | None:
        if revision == "main":
            return list(self.commits)[-1] if self.commits else None
        return revision if revision in self.commits else None


@dataclass
class Hub:
    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    asked: list[str] = field(default_factory=list)  # method and path of every request
    tampered: dict[str, bytes] = field(default_factory=dict)  # what is sent in place of a file


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        path, body = self._begin()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if not self._may_write():
            return self._error(401, "Invalid credentials")
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said.get('organization', 'me')}/{said['name']}"
            if name.startswith("forbidden/"):
                return self._error(403, "You don't have the rights to create a model under the namespace")
            if name in self.hub.repositories:
                return self._error(409, "exists", url=f"{self.hub.address}/{name}")
            self.hub.repositories[name] = Repository(said.get("visibility") == "private" or bool(said.get("private")))
            return self._json({"url": f"{self.hub.address}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            return self._json(
                {"transfer": "basic", "objects": [self._upload(one) for one in json.loads(body)["objects"]]}
            )
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular"} for f in files
            ]
            return self._json({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        if "/commit/" in path:
            return self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        return self._error(404, "Not found")

    def do_PUT(self) -> None:
        path, body = self._begin()
        assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
        self.hub.blobs[path.rpartition("/")[2]] = body
        self._json({})

    def do_GET(self) -> None:
        path, _ = self._begin()
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            found = self._found(name, unquote(revision) or "main")
            return self._info(name, *found) if found else None
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        found = self._found(name, unquote(revision))
        if found:
            commit, files = found
            if unquote(file) not in files:
                return self._error(404, "Entry not found", code="EntryNotFound")
            self._file(commit, self.hub.tampered.get(file, files[unquote(file)]))
        return None

    do_HEAD = do_GET

    def _begin(self) -> tuple[str, bytes]:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        return path, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._may_write()):
            return self._error(401, "Repository not found", code="RepoNotFound")
        commit = repository.at(revision)
        if commit is None:
            return self._error(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return commit, repository.commits[commit]

    def _info(self, name: str, commit: str, files: dict[str, bytes]) -> None:
        siblings = []
        for file, content in files.items():
            said: dict[str, Any] = {
                "rfilename": file,
                "size": len(content),
                "blobId": hashlib.sha1(content).hexdigest(),
            }
            if file.endswith(LARGE):
                said["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(said)
        self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": [], "private": False})

    def _upload(self, one: dict[str, Any]) -> dict[str, Any]:
        if one["oid"] in self.hub.blobs:
            return one
        return one | {"actions": {"upload": {"href": f"{self.hub.address}/blobs/{one['oid']}", "header": {}}}}

    def _commit(self, name: str, body: bytes) -> None:
        changed = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.blobs[value["oid"]]
        commit = self.hub.repositories[name].commit(changed)
        url = f"{self.hub.address}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _file(self, commit: str, content: bytes) -> None:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"})

    def _json(self, said: Any) -> None:
        self._send(200, json.dumps(said).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str = "", **said: str) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message} | (
            {"X-Error-Code": code} if code else {}
        )
        self._send(status, json.dumps({"error": message, **said}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
