"""A small Hub for tests: enough of its HTTP API for the real huggingface_hub client to push and pull.

One token may write (to owner "anna"), one may read. What arrives by LFS is refused unless its sha256 is the one
announced. ``breaks`` counts down connections to cut in the middle of an upload; ``conflict`` is the status of every
commit (409, 412), and ``is_made_meanwhile`` says that a repository appears between the question for it and its making.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

WRITES, READS = "hf_writes", "hf_reads"
OWNER = "anna"


@dataclass
class Repository:
    private: bool
    files: dict[str, tuple[bytes, bool]] = field(default_factory=dict)  # content, is LFS
    commits: list[str] = field(default_factory=lambda: ["0" * 40])
    messages: list[str] = field(default_factory=list)


class FakeHub:
    """``repositories`` by kind/owner/name, requests in ``seen``, the large files by sha256 in ``objects``."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.seen: list[str] = []
        self.breaks = 0
        self.conflict: int | None = None
        self.is_made_meanwhile = False
        hub = self

        class Bound(_Handler):
            pass

        Bound.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[FakeHub]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        hub = self.hub
        split = urlsplit(self.path)
        path = unquote(split.path)
        hub.seen.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and hub.breaks:
            hub.breaks -= 1
            self.rfile.read(size // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self._read_body(size)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        for pattern, answer in _ROUTES:
            if match := re.fullmatch(pattern, path):
                answer(self, token, body, **match.groupdict())
                return
        self._say(404, {"error": f"the fake Hub does not know {self.command} {path}"})

    def _read_body(self, size: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(size)
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _say(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, text: str) -> None:
        self._say(status, {"error": text}, {"X-Error-Code": code, "X-Error-Message": text})

    def _may_write(self, token: str, owner: str) -> bool:
        if token not in (WRITES, READS):
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif token == READS or owner != OWNER:
            self._refuse(403, "", f"You don't have the rights to write under {owner}.")
        else:
            return True
        return False

    def _find(self, token: str, kind: str, id: str) -> Repository | None:
        repository = self.hub.repositories.get(f"{kind}/{id}")
        if repository is None or (repository.private and token not in (WRITES, READS)):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def whoami(self, token: str, body: bytes) -> None:
        if token not in (WRITES, READS):
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return
        auth = {"accessToken": {"displayName": "tests", "role": "write" if token == WRITES else "read"}}
        self._say(200, {"type": "user", "name": OWNER, "auth": auth})

    def validate(self, token: str, body: bytes) -> None:
        content = json.loads(body)["content"]
        ok = content.startswith("---\n") and "license: nonsense" not in content
        self._say(
            200 if ok else 400, {"errors": [] if ok else [{"message": "license is unknown"}], "warnings": []}
        )

    def create(self, token: str, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or OWNER
        if self._may_write(token, owner):
            id = f"{owner}/{asked['name']}"
            key = f"{asked.get('type') or 'model'}s/{id}"
            if self.hub.is_made_meanwhile:
                self.hub.repositories[key] = Repository(True)
            if key in self.hub.repositories:
                self._say(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{id}"})
                return
            private = asked.get("visibility") == "private" or asked.get("private", False)
            self.hub.repositories[key] = Repository(private)
            self._say(200, {"url": f"{self.hub.url}/{id}", "id": id, "name": id})

    def about(self, token: str, body: bytes, kind: str, id: str, revision: str | None = None) -> None:
        if repository := self._find(token, kind, id):
            siblings = [{"rfilename": name, **_entry(*file)} for name, file in repository.files.items()]
            self._say(
                200,
                {
                    "id": id,
                    "modelId": id,
                    "sha": repository.commits[-1],
                    "private": repository.private,
                    "siblings": siblings,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                },
            )

    def tree(self, token: str, body: bytes, kind: str, id: str, revision: str) -> None:
        if repository := self._find(token, kind, id):
            entries = [
                {"type": "file", "path": name, "oid": _blob(content), **_entry(content, large)}
                for name, (content, large) in repository.files.items()
            ]
            self._say(200, entries)

    def preupload(self, token: str, body: bytes, kind: str, id: str, revision: str) -> None:
        if self._may_write(token, id.split("/")[0]) and (repository := self._find(token, kind, id)):
            files = []
            for file in json.loads(body)["files"]:
                is_large = file["path"].endswith(".safetensors")
                there = repository.files.get(file["path"])
                oid = there and (hashlib.sha256(there[0]).hexdigest() if is_large else _blob(there[0]))
                files.append(
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if is_large else "regular",
                        "shouldIgnore": False,
                        "oid": oid,
                    }
                )
            self._say(200, {"files": files})

    def batch(self, token: str, body: bytes, id: str, prefix: str) -> None:
        if self._may_write(token, id.split("/")[0]):
            objects = []
            for asked in json.loads(body)["objects"]:
                entry = {"oid": asked["oid"], "size": asked["size"]}
                if asked["oid"] not in self.hub.objects:
                    entry["actions"] = {"upload": {"href": f"{self.hub.url}/large/{asked['oid']}"}}
                objects.append(entry)
            self._say(200, {"transfer": "basic", "objects": objects})

    def store(self, token: str, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._refuse(400, "", "the content does not have the sha256 that was announced")
            return
        self.hub.objects[oid] = body
        self._say(200, {})

    def commit(self, token: str, body: bytes, kind: str, id: str, revision: str) -> None:
        if not self._may_write(token, id.split("/")[0]) or not (repository := self._find(token, kind, id)):
            return
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        is_stale = header.get("parentCommit") not in (None, repository.commits[-1])
        if status := self.hub.conflict or (412 if is_stale else None):
            self._refuse(status, "", "A commit has happened since. Please refresh and try again.")
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                repository.files[value["path"]] = (self.hub.objects[value["oid"]], True)
            elif line["key"] == "file":
                repository.files[value["path"]] = (base64.b64decode(value["content"]), False)
            else:
                del repository.files[value["path"]]
        repository.messages.append(header["summary"])
        repository.commits.append(hashlib.sha1(body).hexdigest())
        oid = repository.commits[-1]
        self._say(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{id}/commit/{oid}"})

    def resolve(self, token: str, body: bytes, id: str, prefix: str, revision: str, name: str) -> None:
        kind = "datasets" if prefix else "models"
        if not (repository := self._find(token, kind, id)):
            return
        if name not in repository.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content, is_large = repository.files[name]
        tag = hashlib.sha256(content).hexdigest() if is_large else _blob(content)
        headers = {"X-Repo-Commit": repository.commits[-1], "ETag": f'"{tag}"'}
        self._say(200, content, headers)


def _blob(content: bytes) -> str:
    """Return git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(content: bytes, is_large: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": len(content), "blobId": _blob(content)}
    if is_large:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


_KIND = r"/api/(?P<kind>models|datasets)/(?P<id>[\w.-]+/[\w.-]+)"
_PLACE = r"/(?P<prefix>datasets/)?(?P<id>[\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, Any], ...] = (
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/validate-yaml", _Handler.validate),
    (r"/api/repos/create", _Handler.create),
    (_KIND, _Handler.about),
    (_KIND + r"/revision/(?P<revision>\w+)", _Handler.about),
    (_KIND + r"/tree/(?P<revision>\w+)", _Handler.tree),
    (_KIND + r"/preupload/(?P<revision>\w+)", _Handler.preupload),
    (_KIND + r"/commit/(?P<revision>\w+)", _Handler.commit),
    (_PLACE + r"\.git/info/lfs/objects/batch", _Handler.batch),
    (_PLACE + r"/resolve/(?P<revision>\w+)/(?P<name>.+)", _Handler.resolve),
    (r"/large/(?P<oid>[0-9a-f]{64})", _Handler.store),
)
