"""A Hub of our own: the part of its HTTP API that is needed here, in memory, on a port of this machine.

What it demands of a client it demands as the Hub does: tokens, weights as LFS objects that are there before a commit
names them, ndjson. A test can look at what was asked (`requests`) and at what is stored (`repos`), have calls fail
(`fail`) and hold one back (`stall`).
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE, READ, STRANGER = "hf_write", "hf_read", "hf_stranger"
USERS = {WRITE: ("alice", "write"), READ: ("alice", "read"), STRANGER: ("bob", "write")}
Files = dict[str, bytes]


@dataclass
class Repo:
    """`commits` maps a commit's id to its files, `refs` a branch to its commits' ids, `titles` an id to its message."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, list[str]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, ref: str = "main", title: str = "") -> str:
        history = self.refs.setdefault(ref, [])
        oid = hashlib.sha1(repr((ref, len(history), title, sorted(files))).encode()).hexdigest()
        self.commits[oid], self.titles[oid] = dict(files), title
        history.append(oid)
        return oid

    def files(self, ref: str = "main") -> Files:
        return self.commits[self.refs[ref][-1]]


class Answer(Exception):  # noqa: N818
    """Ends a request with a status other than 200."""

    def __init__(self, status: int, code: str = "", message: str = "", url: str = "", **headers: str) -> None:
        super().__init__(status)
        self.status, self.body = status, json.dumps({"error": message or code, "url": url}).encode()
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self.headers = {key: value for key, value in named.items() if value}
        self.headers |= {key.replace("_", "-"): value for key, value in headers.items()}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that hang up, which the tests of interruptions do."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class FakeHub:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: Files = {}
        self.requests: list[str] = []  # "PUT /lfs/..."
        self.sent: dict[str, int] = {}  # request -> bytes of all answers to it
        self.gives_parts = True
        self.failures: list[tuple[re.Pattern[str], int, str]] = []
        self.stalled, self.stalls = threading.Event(), re.compile(r"(?!)")
        self.cut: re.Pattern[str] | None = None
        self.after: Callable[[str], object] = lambda request: None
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Files, **options: Any) -> Repo:
        repo = self.repos[name] = Repo(**options)
        repo.commit(files)
        return repo

    def fail(self, request: str, status: int, times: int = 1, code: str = "") -> None:
        """Answer the next requests that match with this status."""
        self.failures += [(re.compile(request), status, code)] * times

    def stall(self, request: str) -> None:
        """Never answer requests that match; `stalled` is set when there is one."""
        self.stalls = re.compile(request)

    def asked(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self._read_chunks()
        request = f"{self.command} {unquote(address.path)}"
        self.hub.requests.append(request)
        try:
            if self.hub.stalls.search(request):
                self.hub.stalled.set()
                threading.Event().wait(20)
                raise Answer(503)
            self._fail(request)
            status, headers, answer = 200, *self._route(address.path, body)
        except Answer as error:
            status, headers, answer = error.status, error.headers, error.body
        self._send(status, headers, answer, request)
        self.hub.after(request)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, request: str) -> None:
        for number, (pattern, status, code) in enumerate(self.hub.failures):
            if pattern.search(request):
                del self.hub.failures[number]
                raise Answer(status, code, message="as the test wants it", Retry_After="0")

    def _send(self, status: int, headers: dict[str, str], body: bytes, request: str) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if status == 200 and wanted and self.command == "GET" and self.hub.gives_parts:
            status, whole = 206, len(body)
            start, end = int(wanted[1]), min(int(wanted[2] or whole) + 1, whole)
            body = body[start:end]
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{whole}"}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.hub.sent[request] = self.hub.sent.get(request, 0) + len(body)
        if self.hub.cut and self.hub.cut.search(request):
            self.hub.cut, body, self.close_connection = None, body[: len(body) // 2], True
        self.wfile.write(body)

    def _route(self, path: str, body: bytes) -> tuple[dict[str, str], bytes]:
        routes: list[tuple[str, Callable[..., Any]]] = [
            (r"GET /api/whoami-v2", self._whoami),
            (r"POST /api/repos/create", self._create),
            (r"POST /api/validate-yaml", self._validate),
            (r"PUT /lfs/(\w+)", self._put),
            (r"POST /(.+)\.git/info/lfs/objects/batch", self._batch),
            (r"POST /api/models/(.+?)/preupload/(.+)", self._preupload),
            (r"POST /api/models/(.+?)/commit/(.+)", self._commit),
            (r"POST /api/models/(.+?)/branch/(.+)", self._branch),
            (r"GET /api/models/(.+?)/auth-check/write", self._may_write),
            (r"GET /api/models/(.+?)/tree/(.+)", self._tree),
            (r"GET /api/models/(.+?)/revision/(.+)", self._info),
            (r"GET /api/models/(.+)", self._info),
        ]
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*map(unquote, found.groups()))
        for pattern, action in routes:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                names = map(unquote, found.groups())
                value = action(*names, body) if self.command in ("POST", "PUT") else action(*names)
                return {"Content-Type": "application/json"}, json.dumps(value).encode()
        raise Answer(404, message=f"this server does not know {path}")

    def _user(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise Answer(401, message="Invalid credentials in Authorization header")
        return USERS.get(token)

    def _repo(self, name: str, write: bool = False) -> Repo:
        user = self._user()
        repo = self.hub.repos.get(name)
        owner = user is not None and name.startswith(f"{user[0]}/")
        if repo is None or (repo.private and not owner):
            raise Answer(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not (owner and user and user[1] == "write"):
            raise Answer(403, message="you may not write here")
        return repo

    def _in_pull_request(self, revision: str) -> bool:
        """Everybody may open one and add to it."""
        return "create_pr" in self.query or revision.startswith("refs/pr/")

    def _oid(self, repo: Repo, revision: str) -> str:
        oid = repo.refs[revision][-1] if revision in repo.refs else revision
        if oid not in repo.commits:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def _whoami(self) -> Any:
        user = self._user()
        if user is None:
            raise Answer(401, message="Invalid username or password.")
        return {"name": user[0], "type": "user", "orgs": [], "auth": {"accessToken": {"role": user[1]}}}

    def _create(self, body: bytes) -> Any:
        wanted, user = json.loads(body), self._user()
        name = f"{wanted['organization'] or (user or [''])[0]}/{wanted['name']}"
        if user is None or user[1] != "write" or not name.startswith(f"{user[0]}/"):
            raise Answer(403, message=f"You don't have the rights to create {name}")
        if name in self.hub.repos:
            raise Answer(409, message="You already created this model repo", url=f"{self.hub.url}/{name}")
        self.hub.add(name, {".gitattributes": b""}, private=wanted.get("visibility") == "private")
        return {"url": f"{self.hub.url}/{name}", "name": name}

    def _validate(self, body: bytes) -> Any:
        """Check what the Hub's schema says about the fields that we write."""
        block = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(block[1]) if block else {}
        except yaml.YAMLError as error:
            raise Answer(400, message=str(error)) from None
        texts = ("license", "license_name", "license_link", "library_name", "pipeline_tag")
        wrong = [key for key in texts if not isinstance(data.get(key, ""), str)]
        wrong += [key for key in ("tags",) if not all(isinstance(item, str) for item in data.get(key, []))]
        if data.get("base_model_relation", "quantized") not in ("adapter", "merge", "quantized", "finetune"):
            wrong.append("base_model_relation")
        bases = data.get("base_model", [])
        bases = bases if isinstance(bases, list) else [bases]
        if not all(isinstance(base, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) for base in bases):
            wrong.append("base_model")
        if wrong:
            raise Answer(400, message=f"{wrong} must be valid")
        return {"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata in repo card"}]}

    def _preupload(self, name: str, revision: str, body: bytes) -> Any:
        repo = self._repo(name, write=not self._in_pull_request(revision))
        files = repo.commits[self._oid(repo, revision)]
        answer = []
        for file in json.loads(body)["files"]:
            lfs = file["path"].endswith((".safetensors", ".bin")) or file["size"] > 10 << 20
            old = files.get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else _git_oid(old)
            mode = "lfs" if lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    def _batch(self, name: str, body: bytes) -> Any:
        self._repo(name)
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.hub.blobs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def _put(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400, message="not the content that was announced")
        self.hub.blobs[oid] = body
        return {}

    def _commit(self, name: str, revision: str, body: bytes) -> Any:
        create_pr = "create_pr" in self.query
        repo = self._repo(name, write=not self._in_pull_request(revision))
        files = dict(repo.commits[self._oid(repo, revision)])
        title = ""
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.blobs:
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Answer(400, message=f"{key} {value.get('path')} is not possible")
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        oid = repo.commit(files, f"refs/pr/{number}" if create_pr else revision, title)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        return answer | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"} if create_pr else {})

    def _branch(self, name: str, branch: str, body: bytes) -> Any:
        repo = self._repo(name, write=True)
        if branch.startswith("refs/"):
            raise Answer(400, message="a pull request is no branch")
        if branch in repo.refs:
            raise Answer(409, message="Reference already exists")
        repo.refs[branch] = list(repo.refs["main"])
        return {}

    def _may_write(self, name: str) -> Any:
        self._repo(name, write=True)
        return {}

    def _info(self, name: str, revision: str = "main") -> Any:
        repo = self._repo(name)
        oid = self._oid(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        return {"id": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0}

    def _tree(self, name: str, revision: str) -> Any:
        repo = self._repo(name)
        answer = []
        for path, data in repo.commits[self._oid(repo, revision)].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
            if path.endswith((".safetensors", ".bin")):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            answer.append(entry)
        return answer

    def _resolve(self, name: str, revision: str, path: str) -> tuple[dict[str, str], bytes]:
        repo = self._repo(name)
        if repo.gated:
            raise Answer(403 if self._user() else 401, "GatedRepo", f"Access to model {name} is restricted")
        oid = self._oid(repo, revision)
        if path not in repo.commits[oid]:
            raise Answer(404, "EntryNotFound", "Entry not found", X_Repo_Commit=oid)
        data = repo.commits[oid][path]
        etag = hashlib.sha256(data).hexdigest() if path.endswith((".safetensors", ".bin")) else _git_oid(data)
        return {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, data


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
