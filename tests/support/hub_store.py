"""What a Hub stores: contents by SHA-256, repositories with commits and references.

On disk: `blobs/<sha256>` holds every content once, `repos/<type>/<owner>/<name>.json` a
repository's commits and references. A store opened on the same folder continues where the last
one ended.
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
LFS_BYTES = 10 * 1000 * 1000  # larger files must be LFS files
GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (
        "*.safetensors",
        "*.bin",
        "*.pt",
        "*.pth",
        "*.ckpt",
        "*.gguf",
        "*.zip",
        "*tfevents*",
    )
)


class HubError(Exception):
    """An answer other than success, in the Hub's form."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class User:
    """Who a token belongs to; `role` is "write" or "read"."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A file of a commit: size, its content's SHA-256, and git's id (of the pointer, for LFS)."""

    size: int
    sha256: str
    git_oid: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class Commit:
    """All files of the repository at one point, by path."""

    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry]


@dataclass
class Repo:
    """A repository: its commits by id, and references such as `heads/main`, `tags/v1`, `pr/1`."""

    kind: str
    id: str
    private: bool
    created: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit_at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, `refs/...`, or a whole commit id."""
        names = (f"heads/{revision}", f"tags/{revision}", revision.removeprefix("refs/"))
        commit_id = next((self.refs[name] for name in names if name in self.refs), revision)
        if commit_id not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """`commit` and what came before it, newest first."""
        current: Commit | None = commit
        while current is not None:
            yield current
            current = self.commits[current.parent] if current.parent else None

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The newest commit up to `commit` in which the file got its present content."""
        found = commit
        for earlier in self.history(commit):
            if earlier.files.get(path) != commit.files[path]:
                break
            found = earlier
        return found


class HubStore:
    """Contents and repositories in a folder.

    Args:
        root: The folder; made if it does not exist.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.lock = threading.RLock()
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        self.repos: dict[tuple[str, str], Repo] = {}
        for path in self.root.glob("repos/*/*/*.json"):
            repo = _repo_from_json(json.loads(path.read_text(encoding="utf-8")))
            self.repos[repo.kind, repo.id] = repo

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def add_blob(self, chunks: Iterator[bytes], expected: str | None = None) -> tuple[str, int]:
        """Store a content; returns its SHA-256, which must be `expected` if given, and its size."""
        digest, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=self.root, delete=False) as file:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
        sha256 = digest.hexdigest()
        if expected is not None and sha256 != expected:
            os.unlink(file.name)
            raise HubError(400, f"The content's SHA-256 is {sha256}, {expected} was announced")
        os.replace(file.name, self.blob(sha256))
        return sha256, size

    def regular_entry(self, content: bytes) -> Entry:
        sha256, size = self.add_blob(iter([content]))
        return Entry(size, sha256, _git_oid(content), is_lfs=False)

    def lfs_entry(self, sha256: str) -> Entry:
        if not re.fullmatch("[0-9a-f]{64}", sha256) or not self.blob(sha256).is_file():
            raise HubError(400, f"LFS object {sha256} was not uploaded")
        size = self.blob(sha256).stat().st_size
        return Entry(size, sha256, _git_oid(lfs_pointer(sha256, size)), is_lfs=True)

    def create(self, kind: str, repo_id: str, private: bool, author: str) -> Repo:
        """A new repository, with a first commit that holds .gitattributes, as on the Hub."""
        repo = Repo(kind, repo_id, private, _now())
        self.repos[kind, repo_id] = repo
        files = {".gitattributes": self.regular_entry(GITATTRIBUTES.encode())}
        self.add_commit(repo, "heads/main", None, files, "initial commit", "", author)
        return repo

    def add_commit(
        self,
        repo: Repo,
        ref: str,
        parent: Commit | None,
        files: dict[str, Entry],
        title: str,
        message: str,
        author: str,
    ) -> Commit:
        """Append a commit to `ref`."""
        parent_id = parent.id if parent else None
        commit = Commit("", parent_id, title, message, author, _now(), files)
        described = json.dumps([asdict(commit), secrets.token_hex(8)], sort_keys=True)
        commit.id = hashlib.sha1(described.encode()).hexdigest()
        repo.commits[commit.id] = commit
        repo.refs[ref] = commit.id
        self.save(repo)
        return commit

    def lfs_rule(self, commit: Commit) -> Callable[[str, int, bytes], bool]:
        """Whether a file (path, size, first bytes) must be an LFS file under the commit's rules."""
        entry = commit.files.get(".gitattributes")
        text = self.blob(entry.sha256).read_text("utf-8") if entry else ""
        patterns = [line.split()[0] for line in text.splitlines() if "filter=lfs" in line]

        def is_lfs(path: str, size: int, sample: bytes) -> bool:
            name = path.rsplit("/", 1)[-1]
            matches = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
            return matches or size > LFS_BYTES or b"\0" in sample

        return is_lfs

    def apply(self, key: str, value: dict[str, Any], files: dict[str, Entry]) -> None:
        """Carry out one operation of a commit on `files`."""
        if key == "header":
            return
        path = value["path"].rstrip("/")
        if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise HubError(400, f"Invalid path {value['path']!r}")
        if key == "file":
            files[path] = self.regular_entry(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[path] = self.lfs_entry(value["oid"])
        elif key == "deletedFile":
            if path not in files:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            del files[path]
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(f"{path}/")]
            if not inside:
                raise HubError(
                    404, f"A folder with this name doesn't exist: {path}", "EntryNotFound"
                )
            for name in inside:
                del files[name]
        else:
            raise HubError(400, f"Unknown operation {key!r}")

    def save(self, repo: Repo) -> None:
        path = self.root / "repos" / repo.kind / f"{repo.id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(repo)), encoding="utf-8")
        os.replace(partial, path)

    def delete(self, repo: Repo) -> None:
        del self.repos[repo.kind, repo.id]
        (self.root / "repos" / repo.kind / f"{repo.id}.json").unlink()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    )


def _repo_from_json(value: dict[str, Any]) -> Repo:
    for commit in value["commits"].values():
        commit["files"] = {path: Entry(**entry) for path, entry in commit["files"].items()}
    commits = {key: Commit(**commit) for key, commit in value["commits"].items()}
    return Repo(**{**value, "commits": commits})


def file_info(repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    entry = commit.files[path]
    info: dict[str, Any] = {
        "type": "file",
        "path": path,
        "oid": entry.git_oid,
        "size": entry.size,
    }
    if entry.is_lfs:
        pointer = len(lfs_pointer(entry.sha256, entry.size))
        info["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": pointer}
    if expand:
        last = repo.last_change(commit, path)
        info["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
    return info


def sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    info: dict[str, Any] = {"rfilename": path}
    if blobs:
        info |= {"size": entry.size, "blobId": entry.git_oid}
        if entry.is_lfs:
            pointer = len(lfs_pointer(entry.sha256, entry.size))
            info["lfs"] = {"size": entry.size, "sha256": entry.sha256, "pointerSize": pointer}
    return info


def folder_info(path: str, commit: Commit) -> dict[str, Any]:
    inside = sorted(
        (name, entry.git_oid) for name, entry in commit.files.items() if name.startswith(f"{path}/")
    )
    return {
        "type": "directory",
        "path": path,
        "oid": hashlib.sha1(repr(inside).encode()).hexdigest(),
        "size": 0,
    }
