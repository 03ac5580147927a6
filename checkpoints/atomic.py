"""Folders that are there as a whole or not at all."""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Trainer neither resumes from folders of such a name, nor counts them among its checkpoints, nor
# pushes them.
UNFINISHED = "_unfinished"
REPLACED = f"{UNFINISHED}-replaced"
# Linux' arguments of renameat2, and how it says that it cannot.
AT_FDCWD, RENAME_EXCHANGE = -100, 2
CANNOT = (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EBUSY)


@contextmanager
def atomic_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write to, which takes its name when everything in it is on the disk.

    Whatever goes wrong before, `final` is what it was: absent, or the whole older folder. An error
    removes what was written; after a kill it stays as "_unfinished-...", for the next to clear.

    Args:
        final: Its folder must exist; older contents are replaced. A link is followed. An empty
            mount point cannot be replaced: its files come at the end, one after another.

    Yields:
        An empty folder beside it.
    """
    final = Path(os.path.realpath(final))
    recover(final)
    draft = final.with_name(f"{UNFINISHED}-{final.name}")
    remove(draft)
    draft.mkdir()
    try:
        yield draft
        sync_folder(draft)
        publish(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


@contextmanager
def resumable_folder(final: str | os.PathLike[str]) -> Iterator[Path]:
    """As `atomic_folder`, but what was written before an error or a kill stays, and is there when
    the same folder is asked for again.

    Args:
        final: Its folder must exist; older contents are replaced. A link is followed.

    Yields:
        A folder beside it, "_unfinished-...-to-resume".
    """
    final = Path(os.path.realpath(final))
    recover(final)
    draft = final.with_name(f"{UNFINISHED}-{final.name}-to-resume")
    draft.mkdir(exist_ok=True)
    yield draft
    sync_folder(draft)
    publish(draft, final)


def sync_folder(folder: Path) -> None:
    """Wait until all files of a folder are on the disk.

    Raises:
        OSError: For instance if there is no room for them, which some systems say only now.
    """
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    is_posix = os.name == "posix"
    if not is_posix and not path.is_file():  # only there a folder can be opened
        return
    descriptor = os.open(path, os.O_RDONLY if is_posix else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(draft: Path, final: Path) -> None:
    """Give a folder its final name, in place of an older one of that name, in one step where the
    system can; elsewhere `recover` puts the older one back after a kill between two."""
    older = None
    if not os.path.lexists(final):
        draft.rename(final)
    elif exchange(draft, final):
        older = draft
    else:
        older = _replace(draft, final)
    _sync(final.parent)
    if older is not None:
        remove(older)


def _replace(draft: Path, final: Path) -> Path:
    """Put a folder in an older one's place, in two steps; returns what is left to remove."""
    older = _aside(final)
    remove(older)
    try:
        final.rename(older)
    except OSError as error:
        if error.errno != errno.EBUSY or any(final.iterdir()):
            raise
        _fill(draft, final)
        return draft
    try:
        draft.rename(final)
    except BaseException:
        older.rename(final)
        raise
    return older


def _fill(draft: Path, final: Path) -> None:
    """Copy a folder into an empty mount point, which keeps its name; an error empties it again."""
    try:
        shutil.copytree(draft, final, symlinks=True, dirs_exist_ok=True)
        sync_folder(final)
    except BaseException:
        for path in final.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        raise


def exchange(one: Path, two: Path) -> bool:
    """Let two files or folders swap their names in one step; False where the system, or the file
    system, has no call for that, and for mount points.

    Raises:
        OSError: The call failed.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # only Linux has it
        return False
    names = os.fsencode(one), os.fsencode(two)
    if renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(two))


def recover(final: Path) -> None:
    """Give a folder its name back that a kill has kept from being replaced."""
    older = _aside(final)
    if os.path.lexists(older) and not os.path.lexists(final):
        older.rename(final)


def recover_all(folder: Path) -> None:
    """Do so with all in `folder`, where nobody else may be replacing one."""
    for older in folder.glob(f"{REPLACED}-*"):
        recover(folder / older.name.removeprefix(f"{REPLACED}-"))


def _aside(final: Path) -> Path:
    """Where an older folder is while the new one takes its name."""
    return final.with_name(f"{REPLACED}-{final.name}")


def remove(path: Path) -> None:
    """Remove a folder, or the link to one, if it is there."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
