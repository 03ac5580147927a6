"""The loopback Hub that other tests push to, seen through huggingface_hub's own client."""

import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import HubServer
from hub_store import User
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

pytestmark = pytest.mark.transformers

USERS = {
    "hf_me": User("me", orgs=("lab",)),
    "hf_reader": User("me", role="read"),
    "hf_other": User("other"),
}
REPO = "me/model"


@pytest.fixture(autouse=True)
def client_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", USERS) as running:
        yield running


def client(server: HubServer, token: str | bool = "hf_me") -> HfApi:
    return HfApi(endpoint=server.endpoint, token=token)


@pytest.fixture
def api(server: HubServer) -> HfApi:
    made = client(server)
    made.create_repo(REPO)
    return made


def commit(api: HfApi, message: str = "files", **files: bytes) -> str:
    """Commit files, `name__ext=content`; returns the commit's id."""
    operations = [
        CommitOperationAdd(name.replace("__", "."), content) for name, content in files.items()
    ]
    return api.create_commit(REPO, operations, commit_message=message).oid


def read(server: HubServer, name: str, revision: str, cache: Path) -> bytes:
    path = hf_hub_download(
        REPO, name, revision=revision, cache_dir=cache, endpoint=server.endpoint, token=False
    )
    return Path(path).read_bytes()


def folder_with_files(path: Path, large_bytes: int = 300_000) -> dict[str, bytes]:
    files = {
        "config.json": b'{"a": 1}\n',
        "README.md": b"---\nlicense: mit\n---\n# M\xc3\xb6del\n",
        "model.safetensors": os.urandom(large_bytes),
        "empty.txt": b"",
        "binary.dat": b"\x00\x01\x02",
        "deep/er/a file #1%.txt": b"x\r\ny",
    }
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return files


@pytest.mark.parametrize("mode", ["whole", "parts", "redirect"])
def test_a_folder_comes_back_byte_for_byte(mode: str, tmp_path: Path) -> None:
    files = folder_with_files(tmp_path / "local")
    options = {"parts": {"part_bytes": 65536}, "redirect": {"download_host": "localhost"}}
    with HubServer(tmp_path / "hub", USERS, **options.get(mode, {})) as server:
        api = client(server)
        api.create_repo(REPO)
        api.upload_folder(repo_id=REPO, folder_path=tmp_path / "local")
        down = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
        requests = server.requests
    assert {name: (down / name).read_bytes() for name in files} == files
    entries = server.store.repos["model", REPO].commit_at("main").files
    assert {name for name in files if entries[name].is_lfs} == {"model.safetensors", "binary.dat"}
    assert any("/lfs/part/" in path for _, path, _ in requests) == (mode == "parts")
    assert any(path.startswith("/download/") for _, path, _ in requests) == (mode == "redirect")
    assert not [entry for entry in requests if entry[2] >= 400]


def test_unchanged_files_are_not_sent_again(server: HubServer, api: HfApi, tmp_path: Path) -> None:
    folder_with_files(tmp_path / "local")
    first = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "local")
    uploads = [path for method, path, _ in server.requests if method == "PUT"]
    again = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "local")
    assert again.oid == first.oid
    assert [path for method, path, _ in server.requests if method == "PUT"] == uploads


def test_content_other_than_announced_is_refused(server: HubServer, api: HfApi) -> None:
    oid = "ab" * 32
    name = f"{server.endpoint}/lfs/upload/{oid}"
    for address, status in (
        (f"{name}?signature={server.signature('upload', oid)}", 400),
        (f"{name}?signature=00", 403),
        (name, 403),
    ):
        request = urllib.request.Request(address, data=b"something else", method="PUT")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request)
        assert caught.value.code == status
    assert not server.store.blob(oid).exists()
    line = b'{"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "%s"}}\n'
    request = urllib.request.Request(
        f"{server.endpoint}/api/models/{REPO}/commit/main",
        data=line % oid.encode(),
        headers={"Authorization": "Bearer hf_me"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 400 and b"not uploaded" in caught.value.read()
    assert "w.bin" not in api.list_repo_files(REPO)


def test_every_commit_keeps_its_files(server: HubServer, api: HfApi, tmp_path: Path) -> None:
    first = commit(api, "first", a__txt=b"one", w__bin=b"\0one")
    api.create_branch(REPO, branch="side/line")
    api.create_tag(REPO, tag="v1")
    second = commit(api, "second", a__txt=b"two", w__bin=b"\0two")
    api.create_commit(
        REPO, [CommitOperationDelete("a.txt")], commit_message="third", parent_commit=second
    )
    for number, (revision, text, weights) in enumerate(
        ((first, b"one", b"\0one"), ("v1", b"one", b"\0one"), ("side/line", b"one", b"\0one"))
        + ((second, b"two", b"\0two"),)
    ):
        cache = tmp_path / str(number)
        assert read(server, "a.txt", revision, cache) == text
        assert read(server, "w.bin", revision, cache) == weights
    with pytest.raises(EntryNotFoundError):
        read(server, "a.txt", "main", tmp_path / "new")
    titles = [entry.title for entry in api.list_repo_commits(REPO)]
    assert titles == ["third", "second", "first", "initial commit"]
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit == first for ref in refs.branches} == {
        "main": False,
        "side/line": True,
    }
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first)]
    with pytest.raises(HfHubHTTPError) as caught:
        late = [CommitOperationAdd("late.txt", b"late")]
        api.create_commit(REPO, late, commit_message="late", parent_commit=first)
    assert caught.value.response.status_code == 412
    info = api.get_paths_info(REPO, ["w.bin"], expand=True)[0]
    assert info.last_commit.oid == second and info.lfs.size == 4


def test_a_pull_request_leaves_main_alone(server: HubServer, api: HfApi, tmp_path: Path) -> None:
    operations = [CommitOperationAdd("new.txt", b"new")]
    made = api.create_commit(REPO, operations, commit_message="offer", create_pr=True)
    assert made.pr_revision == "refs/pr/1"
    assert "new.txt" not in api.list_repo_files(REPO)
    assert read(server, "new.txt", "refs/pr/1", tmp_path) == b"new"


def test_what_is_missing_raises_the_clients_own_errors(server: HubServer, api: HfApi) -> None:
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "absent.json")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "absent"))
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, ".gitattributes", revision="absent")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="0" * 40)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("me/absent")
    with pytest.raises(RepositoryNotFoundError):
        client(server, token=False).model_info("me/absent")
    with pytest.raises(EntryNotFoundError):
        api.delete_file("absent.json", REPO)
    assert not api.file_exists(REPO, "absent.json") and not api.repo_exists("me/absent")


def test_private_repositories_and_writes_need_the_right_token(server: HubServer) -> None:
    api = client(server)
    assert api.whoami()["name"] == "me"
    api.create_repo("me/secret", private=True)
    assert api.model_info("me/secret").private
    for token in (False, "hf_other"):
        with pytest.raises(RepositoryNotFoundError):
            client(server, token).model_info("me/secret")
        with pytest.raises(RepositoryNotFoundError):
            client(server, token).hf_hub_download("me/secret", ".gitattributes")
    assert client(server, "hf_reader").file_exists("me/secret", ".gitattributes")
    api.create_repo(REPO)
    for token, status in ((False, 401), ("hf_reader", 403), ("hf_other", 403), ("hf_bad", 401)):
        with pytest.raises(HfHubHTTPError) as caught:
            client(server, token).upload_file(
                path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO
            )
        assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        client(server, "hf_bad").whoami()
    with pytest.raises(HfHubHTTPError) as caught:
        client(server, "hf_other").create_repo("me/taken")
    assert caught.value.response.status_code == 403
    assert client(server).create_repo("lab/ours").repo_id == "lab/ours"


def test_repositories_are_made_once_and_can_be_deleted(server: HubServer, api: HfApi) -> None:
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo(REPO)
    assert caught.value.response.status_code == 409
    url = api.create_repo(REPO, exist_ok=True)
    assert url.repo_id == REPO and url == f"{server.endpoint}/{REPO}"
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
    for kind in ("dataset", "space"):
        url = api.create_repo(
            "me/data", repo_type=kind, space_sdk="static" if kind == "space" else None
        )
        assert (url.repo_id, url.repo_type) == ("me/data", kind)
        assert api.list_repo_files("me/data", repo_type=kind) == [".gitattributes"]


def test_listings_come_in_pages(tmp_path: Path) -> None:
    files = folder_with_files(tmp_path / "local")
    with HubServer(tmp_path / "hub", USERS, page_size=2) as server:
        api = client(server)
        api.create_repo(REPO)
        api.upload_folder(repo_id=REPO, folder_path=tmp_path / "local")
        assert sorted(api.list_repo_files(REPO)) == sorted([*files, ".gitattributes"])
        found = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
        assert set(found) == {*files, ".gitattributes", "deep", "deep/er"}
        assert found["model.safetensors"].size == len(files["model.safetensors"])
        below = [entry.path for entry in api.list_repo_tree(REPO, "deep/er")]
        assert below == ["deep/er/a file #1%.txt"]
        info = api.model_info(REPO, files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings if s.rfilename in files} == {
        name: len(content) for name, content in files.items()
    }
    assert info.card_data.license == "mit"


@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [("0-0", 0, 1), ("3-5", 3, 6), ("7-", 7, 10), ("-4", 6, 10), ("4-99", 4, 10)],
)
def test_ranges(server: HubServer, api: HfApi, wanted: str, start: int, stop: int) -> None:
    commit(api, w__bin=b"0123456789")
    request = urllib.request.Request(
        f"{server.endpoint}/{REPO}/resolve/main/w.bin", headers={"Range": f"bytes={wanted}"}
    )
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 206
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/10"
        assert answer.read() == b"0123456789"[start:stop]


def test_a_range_past_the_end_is_refused(server: HubServer, api: HfApi) -> None:
    commit(api, w__bin=b"0123456789")
    request = urllib.request.Request(
        f"{server.endpoint}/{REPO}/resolve/main/w.bin", headers={"Range": "bytes=10-"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 416 and caught.value.headers["Content-Range"] == "bytes */10"


def test_card_metadata_is_checked(api: HfApi) -> None:
    for card in (
        "---\nlicense: [\n---\n",
        "---\nlicense: 3\n---\n",
        "---\nmodel-index:\n- results: []\n---\n",
    ):
        with pytest.raises(ValueError, match="Invalid metadata in README.md"):
            commit(api, README__md=card.encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        commit(api, README__md=b"# no metadata\n")
    assert any("empty or missing yaml metadata" in str(entry.message) for entry in caught)


@pytest.mark.parametrize("path", ["a/../b", ".git/config", "/"])
def test_paths_that_leave_the_repository_are_refused(
    server: HubServer, api: HfApi, path: str
) -> None:
    line = f'{{"key": "file", "value": {{"path": "{path}", "content": ""}}}}\n'
    request = urllib.request.Request(
        f"{server.endpoint}/api/models/{REPO}/commit/main",
        data=line.encode(),
        headers={"Authorization": "Bearer hf_me"},
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    assert caught.value.code == 400
    assert api.list_repo_files(REPO) == [".gitattributes"]


def test_a_new_server_on_the_same_folder_goes_on(tmp_path: Path) -> None:
    files = folder_with_files(tmp_path / "local")
    with HubServer(tmp_path / "hub", USERS) as server:
        api = client(server)
        api.create_repo(REPO, private=True)
        last = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "local").oid
    with HubServer(tmp_path / "hub", USERS) as server:
        api = client(server)
        assert api.model_info(REPO).sha == last and api.model_info(REPO).private
        down = Path(api.snapshot_download(REPO, cache_dir=tmp_path / "cache"))
    assert {name: (down / name).read_bytes() for name in files} == files
