"""Text for the demo and the experiments: the source of Python's standard library, whole files of it
held out; more of the kind in installed packages.

Left out are test suites, and files that a program wrote (code page tables, documentation, build
settings): they would be most of the bytes, and easy to predict for the wrong reason.
"""

import hashlib
import re
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# encodings/ is code page tables; pydoc_data/ is the language's manual.
SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "__phello__", "dist-packages", "encodings", "idle_test")
    + ("pydoc_data", "site-packages", "test", "tests")
)
# How files written by a program begin: a line that says so.
GENERATED = re.compile(
    r"^[#\W]*(this (file|module) (is|was) )?(auto-?|automatically )?generated\b|"
    r"^# system configuration generated",
    re.IGNORECASE | re.MULTILINE,
)
MARK_SEARCH_CHARS = 400
HELD_OUT_PERCENT = 6
# Longer ones are seldom written by hand.
MAX_PACKAGE_FILE_BYTES = 200_000


@dataclass(frozen=True)
class SourceFile:
    """One file: its path relative to the corpus' root, with forward slashes, and its text."""

    name: str
    text: str

    @property
    def num_bytes(self) -> int:
        """Length in UTF-8 bytes."""
        return len(self.text.encode("utf-8"))


def standard_library(root: Path | None = None) -> list[SourceFile]:
    """The hand-written modules of Python's standard library.

    Args:
        root: its folder; None: that of the running interpreter.

    Returns:
        Files in the order of their names, none empty, none twice.

    Raises:
        ValueError: If the folder holds no such files.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    paths = (path for path in sorted(root.rglob("*.py")) if not _is_skipped(path.relative_to(root)))
    files = [file for file in read_files(root, paths) if not _is_generated(file.text)]
    if not files:
        raise ValueError(f"root={str(root)!r} holds no Python modules; allowed: a library's folder")
    return files


def installed_packages(
    left_out: Collection[str] = (), root: Path | None = None
) -> Iterator[SourceFile]:
    """Hand-written modules of installed packages, of all packages in turn.

    Args:
        left_out: Names of files, without folders, such as those of another corpus: some are copies.
        root: The folder of packages; None: that of the running interpreter.
    """
    root = Path(sysconfig.get_paths()["purelib"]) if root is None else root
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(paths, key=name_hash):
        path = paths[name]
        is_wanted = path.name not in left_out and path.stat().st_size <= MAX_PACKAGE_FILE_BYTES
        if is_wanted and not _is_skipped(Path(name)):
            yield from (file for file in read_files(root, [path]) if not _is_generated(file.text))


def first_bytes(files: Iterable[SourceFile], limit: float) -> list[SourceFile]:
    """The first files that have so many bytes together, and no more than it takes."""
    found: list[SourceFile] = []
    size = 0
    for file in files if limit > 0 else ():
        found.append(file)
        size += file.num_bytes
        if size >= limit:
            break
    return found


def read_files(root: Path, paths: Iterable[Path]) -> list[SourceFile]:
    """Files below `root` that are not empty, not repeated, and UTF-8."""
    files, seen = [], set()
    for path in paths:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip() and text not in seen:
            seen.add(text)
            files.append(SourceFile(path.relative_to(root).as_posix(), text))
    return files


def split_by_file(
    files: Sequence[SourceFile], percent: int = HELD_OUT_PERCENT
) -> tuple[list[SourceFile], list[SourceFile]]:
    """Set whole files aside, chosen by a hash of their names: the same ones in every run.

    Args:
        files: The corpus.
        percent: How many of a hundred files are held out, about.

    Returns:
        Training files and held-out files.

    Raises:
        ValueError: If either part would be empty.
    """
    held_out = [file for file in files if name_hash(file.name) % 100 < percent]
    kept = [file for file in files if name_hash(file.name) % 100 >= percent]
    if not held_out or not kept:
        raise ValueError(
            f"percent={percent} of {len(files)} files leaves {len(kept)} for training and "
            f"{len(held_out)} held out; allowed: at least one each"
        )
    return kept, held_out


def name_hash(name: str) -> int:
    """A number that depends on the name only, on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")


def total_bytes(files: Iterable[SourceFile]) -> int:
    """Sum of the files' lengths in UTF-8 bytes."""
    return sum(file.num_bytes for file in files)


def _is_skipped(path: Path) -> bool:
    return any(part in SKIPPED_FOLDERS for part in path.parts[:-1])


def _is_generated(text: str) -> bool:
    return GENERATED.search(text[:MARK_SEARCH_CHARS]) is not None
