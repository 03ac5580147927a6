"""Folders that are there as a whole or not at all, whatever interrupts their writing."""

import ctypes
import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import tiny_model

from kimi_linear.checkpoints import atomic
from kimi_linear.checkpoints.atomic import atomic_folder, resumable_folder

pytestmark = pytest.mark.core


class Killed(BaseException):
    """Stands for a kill at a certain place."""


def replace(final, text):
    with atomic_folder(final) as draft:
        (draft / "x").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_replaced_in_one_step(tmp_path, monkeypatch):
    """Bug: a kill between two renames left no folder of that name."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if not atomic.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system can't exchange two folders")
    final = tmp_path / "saved"
    replace(final, "old")

    def seen(path):
        assert (final / "x").read_text() == "new", f"{path} is removed before {final} is new"
        raise Killed

    monkeypatch.setattr(Path, "rename", lambda *paths: pytest.fail(f"two steps: {paths}"))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(atomic.os, "fsync", lambda _: None)
        patch.setattr(atomic, "remove", lambda p: seen(p) if p.exists() else None)
        replace(final, "new")
    replace(final, "newer")
    assert names(tmp_path) == ["a", "b", "saved"]
    assert (final / "x").read_text() == "newer"


def test_a_folder_is_replaced_where_nothing_can_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "exchange", lambda *paths: False)
    final, rename, calls = tmp_path / "saved", Path.rename, []
    replace(final, "old")

    def second_fails(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise Killed
        return rename(*paths)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", second_fails)
        replace(final, "new")
    assert names(tmp_path) == ["saved"] and (final / "x").read_text() == "old"
    replace(final, "new")
    assert names(tmp_path) == ["saved"] and (final / "x").read_text() == "new"


def test_a_folder_that_another_process_is_replacing_is_left_alone(tmp_path):
    """Bug: writing one folder put back those beside it, in the middle of another's replacement."""
    other = tmp_path / "_unfinished-replaced-other"
    other.mkdir()
    replace(tmp_path / "saved", "new")
    assert names(tmp_path) == [other.name, "saved"]
    atomic.recover_all(tmp_path)
    assert names(tmp_path) == ["other", "saved"]


@pytest.mark.parametrize("older", [True, False])
def test_a_link_to_a_folder_is_followed(tmp_path, older):
    """Bug: a folder took the link's place, on another disk than it led to."""
    elsewhere = tmp_path / "disk" / "elsewhere"
    elsewhere.mkdir(parents=True)
    if older:
        (elsewhere / "x").write_text("old")
    final = tmp_path / "saved"
    final.symlink_to(elsewhere)
    replace(final, "new")
    assert final.is_symlink() and (elsewhere / "x").read_text() == "new"
    assert names(tmp_path) == ["disk", "saved"] and names(elsewhere.parent) == ["elsewhere"]


def test_an_empty_mount_point_is_filled(tmp_path, monkeypatch):
    """Bug: "Device or resource busy", since no mount point can be renamed."""
    final, rename, copy = tmp_path / "saved", Path.rename, shutil.copytree
    final.mkdir()

    def exchange(*args):
        ctypes.set_errno(errno.EBUSY)
        return -1

    def busy(path, target):
        if path == final:
            raise OSError(errno.EBUSY, "busy")
        return rename(path, target)

    def full_disk(*args, **kwargs):
        copy(*args, **kwargs)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace(renameat2=exchange))
    monkeypatch.setattr(Path, "rename", busy)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(shutil, "copytree", full_disk)
        replace(final, "new")
    assert names(tmp_path) == ["saved"] and not names(final)
    replace(final, "new")
    assert names(tmp_path) == ["saved"] and (final / "x").read_text() == "new"
    with pytest.raises(OSError, match="busy"):  # with contents, it can't be replaced as a whole
        replace(final, "newer")
    assert names(tmp_path) == ["saved"] and (final / "x").read_text() == "new"


def test_atomic_folder(tmp_path):
    final = tmp_path / "saved"
    with atomic_folder(final) as draft:
        tiny_model().save_pretrained(draft)
        assert not final.exists()
    saved = sorted(path.name for path in final.iterdir())
    assert "model.safetensors" in saved and names(tmp_path) == ["saved"]
    with pytest.raises(KeyboardInterrupt), atomic_folder(final) as draft:
        (draft / "x").write_text("new")
        raise KeyboardInterrupt
    assert sorted(path.name for path in final.iterdir()) == saved
    with atomic_folder(final) as draft:
        (draft / "x").write_text("new")
    assert names(tmp_path) == ["saved"] and (final / "x").read_text() == "new"


def test_a_resumable_folder_keeps_what_was_written_before_an_error(tmp_path):
    final = tmp_path / "folder"
    with pytest.raises(RuntimeError), resumable_folder(final) as draft:
        (draft / "a").write_text("1")
        raise RuntimeError
    assert not final.exists() and draft.name == "_unfinished-folder-to-resume"
    with resumable_folder(final) as draft:
        assert (draft / "a").read_text() == "1"
        (draft / "b").write_text("2")
    assert sorted(path.name for path in final.iterdir()) == ["a", "b"] and not draft.exists()
