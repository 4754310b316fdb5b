"""A Hub on loopback: what huggingface_hub asks of the real one, for tests, with faults on demand."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import yaml

LFS = (".safetensors", ".png", ".webp")
TOKEN = "hf_" + "w" * 34
READ_TOKEN = "hf_" + "r" * 34
CARRIED_OUT = -1


@dataclass
class Repository:
    """`commits`: {commit: {path: content}}, the last one is main."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[name] = files
        return name


class Hub(ThreadingHTTPServer):
    """`faults`: {a part of a request's path: (status, after how many such requests, and how often if not for ever)};
    status 0 cuts the connection, CARRIED_OUT does so in place of the answer. `retry_after`: of refusals, in seconds.
    `damaged`: files that are sent with another last byte; `truncated`: those of which half is sent. `before`: called
    with each request's path.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.stored: list[str] = []  # blobs, in the order of their arrival
        self.faults: dict[str, tuple[int, ...]] = {}
        self.retry_after: str | None = None
        self.requests: list[tuple[str, str]] = []
        self.damaged: set[str] = set()
        self.truncated: set[str] = set()
        self.before: Callable[[str], object] = lambda path: None

    def add(self, name: str, files: dict[str, bytes] | Path, **settings: Any) -> str:
        """A repository with one commit: of these files, or of a folder."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        self.repositories[name] = Repository(**settings)
        return self.repositories[name].commit(files)

    def fault(self, path: str) -> int | None:
        for part, (status, after, *times) in self.faults.items():
            if part in path:
                self.faults[part] = (status, after - 1, *times)
                return status if after <= 0 and not (times and -after >= times[0]) else None
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub
    silent = False

    def log_message(self, *_: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        if self.silent:
            self.close_connection = True
            return
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    def refuse(self, status: int, code: str = "", message: str = "refused") -> None:
        later = {"Retry_After": self.server.retry_after} if self.server.retry_after else {}
        self.reply({"error": message}, status, X_Error_Code=code, X_Error_Message=message, **later)

    def answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.requests.append((self.command, path))
        self.server.before(f"{self.command} {path}")
        self.silent = False
        if (status := self.server.fault(f"{self.command} {path}")) == CARRIED_OUT:
            self.silent = True
        elif status is not None:
            if status == 0:
                if "Transfer-Encoding" in self.headers or "Content-Length" in self.headers:
                    self.rfile.read(16)  # in the middle of what is sent
                self.close_connection = True
                return
            self.body()
            self.refuse(status)
            return
        content = self.body()
        for pattern, handle in ROUTES:
            if found := re.fullmatch(pattern, path):
                handle(self, content, *found.groups())
                return
        self.refuse(404, "RepoNotFound", "Repository not found")

    do_GET = do_POST = do_PUT = do_HEAD = answer

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def authenticated(self) -> bool:
        if self.token not in (TOKEN, READ_TOKEN):
            self.refuse(401, message="Invalid credentials in Authorization header")
        return self.token in (TOKEN, READ_TOKEN)

    def may_write(self) -> bool:
        if self.token == READ_TOKEN:
            self.refuse(403, message="this token may only read")
        return self.token != READ_TOKEN and self.authenticated()

    def repository(self, name: str, revision: str = "main") -> tuple[Repository, str] | None:
        found = self.server.repositories.get(name)
        if found is None or (found.private and self.token not in (TOKEN, READ_TOKEN)):
            self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
            return None
        if found.gated and self.token != TOKEN:
            self.refuse(403, "GatedRepo", "Access to model is restricted")
            return None
        commit = found.head if revision == "main" else revision
        if commit not in found.commits:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
            return None
        return found, commit

    def whoami(self, _: bytes) -> None:
        if self.authenticated():
            self.reply({"type": "user", "id": "1", "name": "me", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, content: bytes) -> None:
        if not self.may_write():
            return
        requested = json.loads(content)
        name = f"{requested.get('organization') or 'me'}/{requested['name']}"
        if name in self.server.repositories:
            self.refuse(409, message="exists")
            return
        private = bool(requested.get("private")) or requested.get("visibility") == "private"
        self.server.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self.reply({"url": f"{self.server.url}/{name}", "name": name})

    def preupload(self, content: bytes, name: str, revision: str) -> None:
        if self.may_write() and (found := self.repository(name, revision)):
            files = []
            for path in [file["path"] for file in json.loads(content)["files"]]:
                present = found[0].files.get(path)
                mode = {"uploadMode": "lfs" if path.endswith(LFS) else "regular", "shouldIgnore": False}
                files.append({"path": path, **mode, "oid": None if present is None else _oid(path, present)})
            self.reply({"files": files})

    def batch(self, content: bytes, name: str) -> None:
        if not self.may_write():
            return
        objects = []
        for requested in json.loads(content)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/_lfs/{requested['oid']}", "header": {}}}
            objects.append({**requested, **({} if requested["oid"] in self.server.blobs else {"actions": upload})})
        self.reply({"transfer": "basic", "objects": objects})

    def store(self, content: bytes, oid: str) -> None:
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.blobs[oid] = content
        self.server.stored.append(oid)
        self.reply({})

    def commit(self, content: bytes, name: str, revision: str) -> None:
        if not self.may_write() or not (found := self.repository(name, revision)):
            return
        lines = [json.loads(line) for line in content.splitlines()]
        repository, _ = found
        if lines[0]["value"].get("parentCommit") not in (None, repository.head):
            self.refuse(412, message="A commit has happened since")
            return
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        self.reply({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})

    def info(self, _: bytes, name: str, revision: str | None = None) -> None:
        if found := self.repository(name, revision or "main"):
            repository, commit = found
            files = [{"rfilename": path} for path in repository.commits[commit]]
            readme = repository.commits[commit].get("README.md", b"").decode()
            card = yaml.safe_load(readme.split("---")[1]) if readme.startswith("---") else {}
            about = {"_id": "1", "id": name, "sha": commit, "private": repository.private, "cardData": card}
            self.reply({**about, "siblings": files})

    def tree(self, _: bytes, name: str, revision: str, folder: str) -> None:
        if found := self.repository(name, revision):
            files = found[0].commits[found[1]]
            entries = [_entry(path, files[path]) for path in files if path.startswith(folder.strip("/"))]
            self.reply(entries) if entries or not folder else self.refuse(404, "EntryNotFound", "Entry not found")

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        if not (found := self.repository(name, revision)):
            return
        repository, commit = found
        content = repository.commits[commit].get(path)
        if content is None:
            self.reply({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        etag = f'"{_oid(path, content)}"'
        linked = {"X_Linked_Etag": etag, "X_Linked_Size": str(len(content))} if path.endswith(LFS) else {}
        if path in self.server.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if path in self.server.truncated:
            content = content[: len(content) // 2]
        self.reply(content, 200, ETag=etag, X_Repo_Commit=commit, **linked)


def _oid(path: str, content: bytes) -> str:
    if path.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid, size = _oid(path, content), len(content)
    lfs = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if path.endswith(LFS) else {}
    return {"type": "file", "path": path, "size": size, "oid": oid, **lfs}


ROUTES = (
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", lambda self, _: self.reply({"errors": [], "warnings": []})),
    (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", Handler.preupload),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    (r"/_lfs/(\w+)", Handler.store),
    (r"/api/models/([^/]+/[^/]+)/commit/(.+)", Handler.commit),
    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(/.*)?", lambda self, c, n, r, f: self.tree(c, n, r, f or "")),
    (r"/api/models/([^/]+/[^/]+)/revision/(.+)", Handler.info),
    (r"/api/(?:models|datasets)/([^/]+/[^/]+)", Handler.info),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
)
