"""A Hugging Face Hub on loopback, for tests: it keeps commits in memory and serves their bytes.

It speaks what `huggingface_hub` 1.x and 2.x ask when a model is pushed and loaded: repositories,
branches, commits of regular and LFS files (whole or in parts), listings, downloads at a revision.
It has no Xet: clients that push need HF_HUB_DISABLE_XET=1. All reading and writing needs `TOKEN`.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import yaml  # a dependency of huggingface_hub

USER, TOKEN = "me", "hf_me"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")


class HubError(Exception):
    """An answer other than success; the client has an exception of its own for some codes."""

    def __init__(self, status: int, message: str, code: str = "", **answer: str) -> None:
        super().__init__(message)
        self.status, self.answer = status, {"error": message, **answer}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code}


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def etag(self) -> str:
        """SHA-256 of an LFS file, git's id of another."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    files: dict[str, File]


@dataclass
class Repo:
    """Its branches' commits, oldest first."""

    private: bool
    branches: dict[str, list[Commit]]

    def commit_at(self, revision: str) -> Commit:
        """The last commit of a branch, or the commit of this id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        for commit in (commit for branch in self.branches.values() for commit in branch):
            if commit.id == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, branch: str, title: str, files: dict[str, File]) -> Commit:
        commits = self.branches.setdefault(branch, [])
        name = f"{branch} {len(commits)} {title}"
        commits.append(Commit(hashlib.sha1(name.encode()).hexdigest(), title, files))
        return commits[-1]


@dataclass
class Hub:
    """The server, in threads of this process; a context manager.

    Args:
        part_bytes: LFS files larger than this are uploaded in parts of this size.

    Attributes:
        repos: By name, such as "me/model".
        requests: Method, path and status of every request answered.
        refusals: Status by a regular expression for "METHOD /path"; such requests are refused, and
            left without an answer if the status is 0.
    """

    part_bytes: int = 1 << 40
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        files = self.repos[name].commit_at(revision).files
        return {path: file.content for path, file in files.items()}


@dataclass(frozen=True)
class Download:
    """An answer that is no JSON."""

    content: bytes
    headers: dict[str, str]


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []
REPO = r"(?P<name>[\w.-]+/[\w.-]+)"
MODEL = f"/api/models/{REPO}"


def route(method: str, pattern: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a method of the handler; the pattern's groups become its keyword arguments."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    """Answers with what a route returns, as JSON."""

    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _dispatch(self) -> None:
        self.body = self._read_body()
        path = urlsplit(self.path).path
        try:
            answer = self._call_route(path)
            if not isinstance(answer, Download):
                answer = Download(json.dumps(answer).encode(), {})
            self._send(200, answer.content, answer.headers)
        except HubError as error:
            self._send(error.status, json.dumps(error.answer).encode(), error.headers)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _call_route(self, path: str) -> Any:
        for pattern, status in self.hub.refusals.items():
            if re.search(pattern, f"{self.command} {path}"):
                if not status:
                    raise ConnectionError
                raise HubError(status, "Refused on request")
        if not path.startswith("/lfs/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise HubError(401, "Invalid username or password.")
        wanted = "GET" if self.command == "HEAD" else self.command
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if method == wanted and match:
                return function(self, **{k: unquote(v or "") for k, v in match.groupdict().items()})
        raise HubError(404, f"This server has no {self.command} {path}")

    def _read_body(self) -> bytes:
        """By Content-Length, or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `Hub.requests` has it."""

    def _repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.hub.repos[name]

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> Any:
        token = {"accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": USER, "auth": token, "orgs": []}

    @route("POST", "/api/repos/create")
    def create_repo(self) -> Any:
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            raise HubError(409, "You already created this model repo", **answer)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.repos[name] = repo = Repo(private, {})
        repo.add("main", "initial commit", {".gitattributes": File(b"", is_lfs=False)})
        return answer

    @route("POST", f"{MODEL}/branch/(?P<branch>[^/]+)")
    def create_branch(self, name: str, branch: str) -> Any:
        repo = self._repo(name)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = list(repo.branches["main"])
        return {}

    @route("GET", f"{MODEL}(?:/revision/(?P<revision>[^/]+))?")
    def repo_info(self, name: str, revision: str) -> Any:
        repo = self._repo(name)
        commit = repo.commit_at(revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": name, "sha": commit.id, "private": repo.private, "siblings": siblings}

    @route("GET", f"{MODEL}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?")
    def list_tree(self, name: str, revision: str, folder: str) -> Any:
        files = self._repo(name).commit_at(revision).files
        found = [
            {"type": "file", "path": path, "oid": file.etag, "size": len(file.content)}
            for path, file in files.items()
            if path.startswith(f"{folder}/" if folder else "")
        ]
        if not found:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        return found

    @route("GET", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, name: str, revision: str, path: str) -> Any:
        commit = self._repo(name).commit_at(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        return Download(file.content, {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"'})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Any:
        match = re.match(r"---\n(.*?)^---\s*$", json.loads(self.body)["content"], re.S | re.M)
        if match and not isinstance(yaml.safe_load(match[1]), dict):
            raise HubError(400, "the metadata is no mapping")
        return {"errors": [], "warnings": []}

    @route("POST", f"{MODEL}/preupload/(?P<revision>[^/]+)")
    def preupload(self, name: str, revision: str) -> Any:
        files = self._repo(name).commit_at(revision).files
        answer = []
        for item in json.loads(self.body)["files"]:
            path = item["path"]
            is_lfs = path.endswith(LFS_SUFFIXES) or b"\0" in base64.b64decode(item["sample"])
            mode = "lfs" if is_lfs else "regular"
            oid = files[path].etag if path in files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answer}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, name: str) -> Any:
        objects, is_multipart = [], False
        for item in json.loads(self.body)["objects"]:
            oid, size, step = item["oid"], item["size"], self.hub.part_bytes
            upload = {"href": f"{self.hub.endpoint}/lfs/upload/{oid}", "header": {}}
            if size > step:
                is_multipart = True
                parts = range(1, -(-size // step) + 1)
                header = {str(n): f"{self.hub.endpoint}/lfs/part/{oid}/{n}" for n in parts}
                header["chunk_size"] = str(step)
                upload = {"href": f"{self.hub.endpoint}/lfs/complete/{oid}", "header": header}
            actions = {} if oid in self.hub.blobs else {"actions": {"upload": upload}}
            objects.append({"oid": oid, "size": size, **actions})
        return {"transfer": "multipart" if is_multipart else "basic", "objects": objects}

    @route("PUT", "/lfs/upload/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, oid: str) -> Any:
        return self._keep(oid, self.body)

    @route("PUT", r"/lfs/part/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)")
    def lfs_part(self, oid: str, number: str) -> Any:
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        return Download(b"", {"ETag": f'"{number}"'})

    @route("POST", "/lfs/complete/(?P<oid>[0-9a-f]{64})")
    def lfs_complete(self, oid: str) -> Any:
        parts = self.hub.parts.pop(oid)
        return self._keep(oid, b"".join(parts[number] for number in sorted(parts)))

    def _keep(self, oid: str, content: bytes) -> Any:
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, f"The content has another SHA-256 than {oid}, which was announced")
        self.hub.blobs[oid] = content
        return {}

    @route("POST", f"{MODEL}/commit/(?P<branch>[^/]+)")
    def commit(self, name: str, branch: str) -> Any:
        repo, title = self._repo(name), ""
        files = dict(repo.commit_at(branch).files)
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            match line["key"]:
                case "header":
                    title = value["summary"]
                case "file":
                    content = base64.b64decode(value["content"])
                    files[value["path"]] = File(content, is_lfs=False)
                case "lfsFile":
                    files[value["path"]] = File(self.hub.blobs[value["oid"]], is_lfs=True)
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise HubError(400, f"Unknown operation {other!r}")
        new = repo.add(branch, title, files)
        url = f"{self.hub.endpoint}/{name}/commit/{new.id}"
        return {"success": True, "commitOid": new.id, "commitUrl": url}


# ---- processes that use it ----------------------------------------------------------------------


def environment(server: Hub, home: Path, **more: str) -> dict[str, str]:
    """An environment whose only Hub is `server`, with an empty cache."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))
    }
    return kept | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        **more,
    }


def run(command: list[str], env: dict[str, str], cwd: Path) -> str:
    """Run Python; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *command], env=env, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout
