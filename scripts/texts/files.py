"""Texts from files, folders and datasets."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path


class CountedTexts:
    """Texts on their way to the trainer, counted.

    Args:
        texts: the texts, read once.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.num_texts = 0
        self.num_chars = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.num_texts += 1
            self.num_chars += len(text)
            yield text


def find_files(paths: Sequence[str | Path], pattern_glob: str) -> list[tuple[Path, bool]]:
    """List the files to read, each once, in a fixed order.

    Args:
        paths: files, taken as they are, and folders, searched with everything below them.
        pattern_glob: which names to take from folders, for instance `*.py`.

    Returns:
        Each file and whether it was named itself.

    Raises:
        ValueError: a path does not exist, or a folder holds no such file.
    """
    found: dict[Path, bool] = {}
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(file for file in path.rglob(pattern_glob) if file.is_file())
            if not below:
                raise ValueError(f"{path} holds no file named {pattern_glob!r} (--pattern-glob)")
            for file in below:
                found.setdefault(file, False)
        elif path.is_file():
            found[path] = True
        else:
            raise ValueError(f"{path} does not exist; allowed: files and folders")
    return list(found.items())


def read_files(files: Iterable[tuple[Path, bool]]) -> Iterator[str]:
    """Read files as UTF-8 text.

    Args:
        files: each file and whether it was named itself (see `find_files`).

    Yields:
        The text of each file. Files of a folder that are not UTF-8 are skipped, with a note.

    Raises:
        ValueError: a file that was named itself is not UTF-8.
    """
    for file, is_named in files:
        try:
            yield file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            if is_named:
                raise ValueError(f"{file} is not UTF-8 text ({error})") from error
            print(f"skipped, not UTF-8 text: {file}")


def read_dataset(
    dataset: str, text_column: str, *, config: str | None = None, split: str = "train"
) -> Iterator[str]:
    """Read one column of a dataset.

    Args:
        dataset: a dataset of the Hub or a local folder, as `datasets.load_dataset` takes it.
        text_column: the column that holds the texts.
        config: the configuration of the dataset, if it has several.
        split: the split to read.

    Yields:
        The text of each row, rows without text left out.

    Raises:
        ValueError: there is no such column.
    """
    from datasets import load_dataset

    rows = load_dataset(dataset, config, split=split)
    if text_column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise ValueError(f"--text-column is {text_column!r}; allowed in {dataset}: {columns}")
    for batch in rows.select_columns([text_column]).iter(batch_size=1000):
        yield from (text for text in batch[text_column] if text is not None)
