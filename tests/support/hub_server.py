"""A Hugging Face Hub on loopback, for tests: it stores commits and serves them byte for byte.

It speaks the part of the Hub's HTTP interface that `huggingface_hub` 1.x and 2.x use to create
repositories, commit (regular and LFS files, in one or several parts), list, inspect and download
at any revision. Xet is not offered: clients that push need HF_HUB_DISABLE_XET=1.

Examples:
    HF_HUB_DISABLE_XET=1 HF_ENDPOINT=http://127.0.0.1:8123 hf repo create me/model --token hf_me
    python tests/hub_server.py --root hub-data --port 8123 --user me:hf_me
"""

import argparse
import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml  # a dependency of huggingface_hub
from hub_store import CHUNK_BYTES, HubError, HubStore, Repo, User, file_info, folder_info, sibling


class HubServer:
    """The server, in threads of this process; a context manager.

    Args:
        root: Where to store.
        users: User by token.
        port: Port on 127.0.0.1; 0 for a free one.
        part_bytes: LFS files larger than this are uploaded in parts of this size.
        page_size: Files per page of a listing.
        download_host: Another name of this host; LFS files are then served by redirection to it,
            as the Hub redirects to its content network. None: directly.

    Attributes:
        requests: Method, path and status of every request answered.
        refusals: Status by a regular expression for "METHOD /path"; such requests are refused, and
            left without an answer if the status is 0.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        users: dict[str, User],
        *,
        port: int = 0,
        part_bytes: int | None = None,
        page_size: int = 1000,
        download_host: str | None = None,
    ) -> None:
        self.store = HubStore(root)
        self.users, self.part_bytes, self.page_size = users, part_bytes, page_size
        self.requests: list[tuple[str, str, int]] = []
        self.refusals: dict[str, int] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self._secret = secrets.token_bytes(32)
        handler = type("Handler", (HubHandler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.download_url = download_host and f"http://{download_host}:{self.port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def signature(self, *parts: object) -> str:
        """What makes a URL that carries no token valid."""
        return hmac.new(self._secret, repr(parts).encode(), "sha256").hexdigest()


Route = tuple[str, re.Pattern[str], Callable[..., None]]
REPO_ID = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>model|dataset|space)s/{REPO_ID}"
WEB = rf"/(?:(?P<kind>dataset|space)s/)?{REPO_ID}"
REV = r"(?P<revision>[^/]+)"
ROUTES: list[Route] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a handler's method; the pattern's groups become its keyword arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class HubHandler(BaseHTTPRequestHandler):
    """Answers requests, one connection each."""

    hub: ClassVar[HubServer]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    # ---- plumbing

    def _dispatch(self) -> None:
        self._body_read = False
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        try:
            self._call_route(url.path)
        except HubError as error:
            self._send_error(error)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            self._send_error(HubError(500, f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._drain()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def _call_route(self, path: str) -> None:
        for pattern, status in self.hub.refusals.items():
            if re.search(pattern, f"{self.command} {path}"):
                if not status:
                    raise ConnectionError
                raise HubError(status, "Refused\non request")
        wanted = "GET" if self.command == "HEAD" else self.command
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if method == wanted and match:
                function(self, **{k: unquote(v or "") for k, v in match.groupdict().items()})
                return
        raise HubError(404, f"This server has no {self.command} {path}")

    def _chunks(self) -> Iterator[bytes]:
        """The request's body, by Content-Length or in chunks."""
        self._body_read = True
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        left = 0 if chunked else int(self.headers.get("Content-Length") or 0)
        while True:
            if chunked and left == 0:
                left = int(self.rfile.readline().split(b";")[0], 16)
                if left == 0:
                    self.rfile.readline()
                    return
            if left == 0:
                return
            data = self.rfile.read(min(left, CHUNK_BYTES))
            if not data:
                raise ConnectionError("the body ended early")
            left -= len(data)
            yield data
            if chunked and left == 0:
                self.rfile.readline()

    def _drain(self) -> None:
        """Read what is left of the body, so that the connection can serve the next request."""
        if self._body_read:
            return
        try:
            for _ in self._chunks():
                pass
        except ConnectionError:
            self.close_connection = True

    def _json(self) -> Any:
        try:
            return json.loads(b"".join(self._chunks()) or b"{}")
        except ValueError as error:
            raise HubError(400, f"The body is not JSON: {error}") from error

    def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._headers(
            status,
            {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **(headers or {}),
            },
        )
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_error(self, error: HubError) -> None:
        headers = {"X-Error-Message": error.message.replace("\n", " "), **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        self._send({"error": error.message}, error.status, headers)

    def _headers(self, status: int, headers: dict[str, str]) -> None:
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: `HubServer.requests` has it."""

    def _flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("true", "1")

    # ---- who may do what

    def _user(self) -> User | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.hub.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _writer(self, namespace: str) -> User:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user.role != "write" or namespace not in (user.name, *user.orgs):
            raise HubError(403, f"You don't have the rights to write in the namespace {namespace}")
        return user

    def _repo(self, kind: str, repo_id: str) -> Repo:
        """The repository, if the caller may read it."""
        user = self._user()
        repo = self.hub.store.repos.get((kind or "model", repo_id))
        mine = user is not None and repo_id.split("/")[0] in (user.name, *user.orgs)
        if repo is None or (repo.private and not mine):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _writable(self, kind: str, repo_id: str) -> tuple[Repo, User]:
        repo = self._repo(kind, repo_id)
        return repo, self._writer(repo_id.split("/")[0])

    def _check_signature(self, *parts: object) -> None:
        given = self.query.get("signature", "")
        if not hmac.compare_digest(given, self.hub.signature(*parts)):
            raise HubError(403, "The URL's signature is wrong")

    # ---- users, repositories, references

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        token = {"accessToken": {"displayName": "test", "role": user.role}}
        orgs = [{"type": "org", "name": name} for name in user.orgs]
        self._send(
            {"type": "user", "id": user.name, "name": user.name, "auth": token, "orgs": orgs}
        )

    @route("POST", "/api/repos/create")
    def create_repo(self) -> None:
        wanted = self._json()
        user = self._user()
        namespace = wanted.get("organization") or (user.name if user else "")
        user = self._writer(namespace)
        kind, repo_id = wanted.get("type") or "model", f"{namespace}/{wanted['name']}"
        answer = {"url": self._url(kind, repo_id), "name": repo_id}
        if not re.fullmatch(REPO_ID, repo_id) or ".." in repo_id:
            raise HubError(400, f"Invalid repository name {repo_id!r}")
        with self.hub.store.lock:
            if (kind, repo_id) in self.hub.store.repos:
                self._send({**answer, "error": f"You already created this {kind} repo"}, 409)
                return
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.store.create(kind, repo_id, private, user.name)
        self._send(answer)

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self) -> None:
        wanted = self._json()
        user = self._user()
        namespace = wanted.get("organization") or (user.name if user else "")
        repo, _ = self._writable(wanted.get("type") or "model", f"{namespace}/{wanted['name']}")
        with self.hub.store.lock:
            self.hub.store.delete(repo)
        self._send({})

    @route("GET", f"{API}/auth-check")
    def auth_check(self, kind: str, repo_id: str) -> None:
        self._repo(kind, repo_id)
        self._send({})

    @route("GET", f"{API}/refs")
    def list_refs(self, kind: str, repo_id: str) -> None:
        repo = self._repo(kind, repo_id)
        groups: dict[str, list[dict[str, str]]] = {"heads": [], "tags": [], "pr": []}
        for ref, commit_id in repo.refs.items():
            group, _, name = ref.partition("/")
            shown = f"refs/{ref}" if group == "pr" else name
            groups[group].append({"name": shown, "ref": f"refs/{ref}", "targetCommit": commit_id})
        self._send(
            {
                "branches": groups["heads"],
                "tags": groups["tags"],
                "pullRequests": groups["pr"],
                "converts": [],
            }
        )

    @route("POST", f"{API}/branch/(?P<name>[^/]+)")
    def create_branch(self, kind: str, repo_id: str, name: str) -> None:
        start = self._json().get("startingPoint") or "main"
        self._create_ref(kind, repo_id, f"heads/{name}", start)

    @route("POST", f"{API}/tag/{REV}")
    def create_tag(self, kind: str, repo_id: str, revision: str) -> None:
        self._create_ref(kind, repo_id, f"tags/{self._json()['tag']}", revision)

    @route("DELETE", f"{API}/(?P<group>branch|tag)/(?P<name>[^/]+)")
    def delete_ref(self, kind: str, repo_id: str, group: str, name: str) -> None:
        repo, _ = self._writable(kind, repo_id)
        ref = f"{'heads' if group == 'branch' else 'tags'}/{name}"
        with self.hub.store.lock:
            if ref not in repo.refs:
                raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
            del repo.refs[ref]
            self.hub.store.save(repo)
        self._send({})

    def _create_ref(self, kind: str, repo_id: str, ref: str, start: str) -> None:
        repo, _ = self._writable(kind, repo_id)
        with self.hub.store.lock:
            if ref in repo.refs:
                raise HubError(409, f"Reference already exists: refs/{ref}")
            repo.refs[ref] = repo.commit_at(start).id
            self.hub.store.save(repo)
        self._send({})

    # ---- what a repository holds

    @route("GET", f"{API}(?:/revision/{REV})?")
    def repo_info(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self._repo(kind, repo_id)
        commit = repo.commit_at(revision or "main")
        card = commit.files.get("README.md")
        card_data = (
            _front_matter(self.hub.store.blob(card.sha256).read_text("utf-8")) if card else None
        )
        blobs = self._flag("blobs")
        self._send(
            {
                "_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24],
                "id": repo_id,
                "modelId": repo_id,
                "author": repo_id.split("/")[0],
                "sha": commit.id,
                "private": repo.private,
                "createdAt": repo.created,
                "lastModified": commit.date,
                "tags": (card_data or {}).get("tags", []),
                "cardData": card_data,
                "siblings": [sibling(path, entry, blobs) for path, entry in commit.files.items()],
            }
        )

    @route("GET", f"{API}/tree/{REV}(?:/(?P<folder>.*))?")
    def list_tree(self, kind: str, repo_id: str, revision: str, folder: str) -> None:
        repo = self._repo(kind, repo_id)
        commit = repo.commit_at(revision)
        prefix = f"{folder.strip('/')}/" if folder else ""
        recursive = self._flag("recursive")
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(path for path in commit.files if path.startswith(prefix)):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                found.setdefault(name, folder_info(name, commit))
            if recursive or len(parts) == 1:
                found[path] = file_info(repo, commit, path, self._flag("expand"))
        if prefix and not found:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        start, size = int(self.query.get("cursor", 0)), self.hub.page_size
        headers = {}
        if start + size < len(found):
            kept = {**self.query, "cursor": str(start + size)}
            address = f"{self.hub.endpoint}{urlsplit(self.path).path}?" + "&".join(
                f"{key}={quote(value)}" for key, value in kept.items()
            )
            headers["Link"] = f'<{address}>; rel="next"'
        self._send(list(found.values())[start : start + size], headers=headers)

    @route("POST", f"{API}/paths-info/{REV}")
    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self._repo(kind, repo_id)
        commit = repo.commit_at(revision)
        form = parse_qs(b"".join(self._chunks()).decode())
        self.query["expand"] = form.get("expand", ["false"])[-1]
        answer = []
        for path in form.get("paths", []):
            if path in commit.files:
                answer.append(file_info(repo, commit, path, self._flag("expand")))
            elif any(name.startswith(f"{path}/") for name in commit.files):
                answer.append(folder_info(path, commit))
        self._send(answer)

    @route("GET", f"{API}/commits/{REV}")
    def list_commits(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self._repo(kind, repo_id)
        self._send(
            [
                {
                    "id": commit.id,
                    "title": commit.title,
                    "message": commit.message,
                    "date": commit.date,
                    "authors": [{"user": commit.author}],
                }
                for commit in repo.history(repo.commit_at(revision))
            ]
        )

    # ---- download

    @route("GET", f"{WEB}/resolve/{REV}/(?P<path>.+)")
    def resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(kind, repo_id)
        commit = repo.commit_at(revision)
        entry = commit.files.get(path)
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.id)
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{entry.etag}"'}
        if entry.is_lfs:
            headers |= {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
            if self.hub.download_url:
                signature = self.hub.signature("download", entry.sha256)
                headers["Location"] = (
                    f"{self.hub.download_url}/download/{entry.sha256}?signature={signature}"
                )
                self._headers(302, {**headers, "Content-Length": "0"})
                return
        self._send_content(self.hub.store.blob(entry.sha256), headers)

    @route("GET", "/download/(?P<sha256>[0-9a-f]{64})")
    def download(self, sha256: str) -> None:
        self._check_signature("download", sha256)
        if self.headers.get("Authorization"):
            raise HubError(400, "A token must not leave the Hub's own host")
        self._send_content(self.hub.store.blob(sha256), {"ETag": f'"{sha256}"'})

    def _send_content(self, path: Path, headers: dict[str, str]) -> None:
        """A file, or the range of it that the request wants."""
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if match and any(match.groups()):
            first, last = match.groups()
            start = int(first) if first else max(0, size - int(last))
            stop = min(int(last) + 1, size) if first and last else size
            if start >= stop:
                raise HubError(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
            status = 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        headers |= {"Content-Length": str(stop - start), "Accept-Ranges": "bytes"}
        self._headers(status, {"Content-Type": "application/octet-stream", **headers})
        if self.command == "HEAD":
            return
        with open(path, "rb") as file:
            file.seek(start)
            while start < stop:
                data = file.read(min(CHUNK_BYTES, stop - start))
                start += len(data)
                self.wfile.write(data)

    # ---- upload

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> None:
        try:
            data = _front_matter(self._json()["content"])
            errors = _card_errors(data)
        except yaml.YAMLError as error:
            data, errors = {}, [f"the metadata is not YAML: {error}"]
        warnings = [] if data or errors else ["empty or missing yaml metadata in repo card"]
        answer = {
            "errors": [{"message": message} for message in errors],
            "warnings": [{"message": message} for message in warnings],
        }
        if errors:
            self._send({**answer, "error": "; ".join(errors)}, 400)
        else:
            self._send(answer)

    @route("POST", f"{API}/preupload/{REV}")
    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        repo, _ = self._writable(kind, repo_id)
        commit = repo.commit_at(revision)
        is_lfs = self.hub.store.lfs_rule(commit)
        answer = []
        for item in self._json()["files"]:
            path, sample = item["path"], base64.b64decode(item["sample"])
            mode = "lfs" if is_lfs(path, item["size"], sample) else "regular"
            oid = commit.files[path].etag if path in commit.files else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send({"files": answer})

    @route("POST", rf"{WEB}\.git/info/lfs/objects/batch")
    def lfs_batch(self, kind: str, repo_id: str) -> None:
        self._writable(kind, repo_id)
        wanted = self._json()
        if wanted.get("operation") != "upload" or wanted.get("hash_algo") != "sha256":
            raise HubError(422, "Only operation=upload with hash_algo=sha256 is served")
        objects = [self._lfs_object(item["oid"], item["size"]) for item in wanted["objects"]]
        in_parts = any(
            "chunk_size" in item["actions"]["upload"]["header"]
            for item in objects
            if "actions" in item
        )
        self._send({"transfer": "multipart" if in_parts else "basic", "objects": objects})

    def _lfs_object(self, oid: str, size: int) -> dict[str, Any]:
        """Where to upload an object; no actions if it is here already."""
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if not re.fullmatch("[0-9a-f]{64}", oid):
            return {**answer, "error": {"code": 422, "message": f"{oid!r} is no SHA-256"}}
        if self.hub.store.blob(oid).is_file():
            return answer
        part_bytes = self.hub.part_bytes
        action = "upload"
        header: dict[str, str] = {}
        if part_bytes is not None and size > part_bytes:
            action, header = "complete", {"chunk_size": str(part_bytes)}
            for number in range(1, -(-size // part_bytes) + 1):
                header[str(number)] = self._lfs_url("part", f"{oid}/{number}")
        verify = {"href": f"{self.hub.endpoint}/lfs/verify", "header": {}}
        upload = {"href": self._lfs_url(action, oid), "header": header}
        return {**answer, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def _lfs_url(self, action: str, name: str) -> str:
        return (
            f"{self.hub.endpoint}/lfs/{action}/{name}?signature={self.hub.signature(action, name)}"
        )

    @route("PUT", "/lfs/upload/(?P<oid>[0-9a-f]{64})")
    def lfs_upload(self, oid: str) -> None:
        self._check_signature("upload", oid)
        self.hub.store.add_blob(self._chunks(), expected=oid)
        self._send({})

    @route("PUT", r"/lfs/part/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)")
    def lfs_part(self, oid: str, number: str) -> None:
        self._check_signature("part", f"{oid}/{number}")
        data = b"".join(self._chunks())
        self.hub.parts.setdefault(oid, {})[int(number)] = data
        self._send({}, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    @route("POST", "/lfs/complete/(?P<oid>[0-9a-f]{64})")
    def lfs_complete(self, oid: str) -> None:
        self._check_signature("complete", oid)
        parts = self.hub.parts.get(oid, {})
        contents = []
        for item in sorted(self._json()["parts"], key=lambda item: item["partNumber"]):
            data = parts.get(item["partNumber"], b"")
            if item["etag"] != f'"{hashlib.md5(data).hexdigest()}"':
                raise HubError(400, f"Part {item['partNumber']} has another ETag")
            contents.append(data)
        self.hub.store.add_blob(iter(contents), expected=oid)
        self.hub.parts.pop(oid, None)
        self._send({})

    @route("POST", "/lfs/verify")
    def lfs_verify(self) -> None:
        if self._user() is None:
            raise HubError(401, "Invalid username or password.")
        wanted = self._json()
        if self.hub.store.lfs_entry(wanted["oid"]).size != wanted["size"]:
            raise HubError(400, f"LFS object {wanted['oid']} has another size")
        self._send({})

    @route("POST", f"{API}/commit/{REV}")
    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        repo, user = self._writable(kind, repo_id)
        lines = [json.loads(line) for line in b"".join(self._chunks()).splitlines() if line]
        header: dict[str, Any] = next(
            (line["value"] for line in lines if line["key"] == "header"), {}
        )
        with self.hub.store.lock:
            parent = repo.commit_at(revision)
            if header.get("parentCommit") not in (None, parent.id):
                raise HubError(412, f"{revision} has moved on to {parent.id}")
            files = dict(parent.files)
            for line in lines:
                self.hub.store.apply(line["key"], line["value"], files)
            ref = self._target(repo, revision)
            texts = (header.get("summary", ""), header.get("description", ""))
            new = self.hub.store.add_commit(repo, ref, parent, files, *texts, user.name)
        url = self._url(kind, repo_id)
        answer = {"success": True, "commitOid": new.id, "commitUrl": f"{url}/commit/{new.id}"}
        if ref.startswith("pr/"):
            answer["pullRequestUrl"] = f"{url}/discussions/{ref.removeprefix('pr/')}"
        self._send(answer)

    def _target(self, repo: Repo, revision: str) -> str:
        """The reference that a commit moves: a branch, a pull request, or a new pull request."""
        if self.query.get("create_pr") == "1":
            return f"pr/{1 + sum(ref.startswith('pr/') for ref in repo.refs)}"
        for ref in (f"heads/{revision}", revision.removeprefix("refs/")):
            if ref in repo.refs and not ref.startswith("tags/"):
                return ref
        raise HubError(400, f"{revision} is no branch: commits go to branches")

    def _url(self, kind: str, repo_id: str) -> str:
        prefix = "" if kind in ("", "model") else f"{kind}s/"
        return f"{self.hub.endpoint}/{prefix}{repo_id}"


def _front_matter(text: str) -> dict[str, Any]:
    """The YAML between the two `---` lines that open a card; empty if there is none."""
    match = re.match(r"\A---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
    return (yaml.safe_load(match[1]) or {}) if match else {}


def _card_errors(data: Any) -> list[str]:
    """What the Hub refuses in a card's metadata; the fields that models use."""
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    errors = []
    for name in ("license", "library_name", "pipeline_tag"):
        if name in data and not isinstance(data[name], str):
            errors.append(f'"{name}" must be a string')
    for name in ("tags", "datasets", "language"):
        values = data.get(name, [])
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) for value in values):
            errors.append(f'"{name}" must be a string or a list of strings')
    for index, model in enumerate(data.get("model-index") or []):
        where = f"model-index[{index}]"
        for result in model.get("results", ()) if model.get("name") else [{}]:
            parts = (result.get("task"), result.get("dataset"), *result.get("metrics", [None]))
            if not all(isinstance(part, dict) and part.get("type") for part in parts):
                errors.append(f'"{where}" needs a name, and task, dataset and metrics with a type')
    return errors


def main(*, root: str, port: int, users: dict[str, User]) -> None:
    """Serve until interrupted."""
    with HubServer(root, users, port=port) as server:
        print(f"HF_ENDPOINT={server.endpoint}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("stopped")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="folder to store in")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0: any free one")
    parser.add_argument("--user", action="append", required=True, metavar="NAME:TOKEN")
    return parser.parse_args()


if __name__ == "__main__":
    args = _parse_args()
    pairs = [entry.partition(":") for entry in args.user]
    main(root=args.root, port=args.port, users={token: User(name) for name, _, token in pairs})
