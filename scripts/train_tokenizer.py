"""Train a tokenizer: a byte-level BPE with Kimi Linear's pattern and special tokens.

The output folder loads through `AutoTokenizer.from_pretrained` without custom code. It also holds
`tiktoken.model`, the same vocabulary in tiktoken's format.

Examples:
    python scripts/train_tokenizer.py src docs --pattern-glob "*.py" --vocab-size 8192 --output tok
    python scripts/train_tokenizer.py corpus.txt --vocab-size 32768 --output tok --eos-token "[EOS]"
    python scripts/train_tokenizer.py --dataset roneneldan/TinyStories --text-column text \\
        --vocab-size 4096 --output tok
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from kimi_linear.tokenizer.convert import convert_tiktoken
from kimi_linear.tokenizer.special_tokens import CHAT_EOS_TOKEN, EOS_TOKENS
from kimi_linear.tokenizer.train import train_bpe


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


def main(
    *,
    paths: Sequence[str | Path] = (),
    vocab_size: int,
    output: str | Path,
    pattern_glob: str = "*",
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    min_frequency: int = 2,
    eos_token: str = CHAT_EOS_TOKEN,
    model_max_length: int = 1_048_576,
) -> None:
    """Train on files or on a dataset and write the tokenizer's folder.

    Args:
        paths: files and folders to read; leave empty with `dataset`.
        vocab_size: ids of the tokenizer, the 256 special ids among them.
        output: the folder to write.
        pattern_glob: which files to take from folders.
        dataset: a dataset to read in place of files.
        dataset_config: the configuration of the dataset.
        split: the split of the dataset.
        text_column: the column of the dataset.
        min_frequency: how often a pair must occur to become a token.
        eos_token: what ends an answer, `<|im_end|>` or `[EOS]`.
        model_max_length: the context length in tokens that the tokenizer announces.

    Raises:
        ValueError: an argument is out of range, or there is too little text for `vocab_size`.
    """
    if bool(paths) == (dataset is not None):
        raise ValueError("give either files and folders or --dataset, one of the two")
    if dataset is None:
        texts = CountedTexts(read_files(find_files(paths, pattern_glob)))
    else:
        texts = CountedTexts(read_dataset(dataset, text_column, config=dataset_config, split=split))
    start = time.perf_counter()
    ranks = train_bpe(texts, vocab_size, min_frequency=min_frequency)
    seconds = time.perf_counter() - start
    print(
        f"trained on {texts.num_texts:,} texts, {texts.num_chars:,} characters, in {seconds:.1f} s"
    )
    tokenizer = convert_tiktoken(
        ranks,
        output,
        eos_token=eos_token,
        model_max_length=model_max_length,
        vocab_size=vocab_size,
    )
    print(f"wrote {len(tokenizer):,} tokens to {output}")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, its names being those of `main`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("paths", nargs="*", metavar="FILE_OR_DIR", help="texts to train on")
    add("--vocab-size", type=int, required=True, help="size with the 256 special ids, >= 512")
    add("--output", required=True, metavar="DIR", help="folder to write")
    add("--pattern-glob", default="*", help="which files of folders to read (default: all)")
    add("--dataset", help="dataset of the Hub, or a local folder of one")
    add("--dataset-config", help="configuration of the dataset")
    add("--split", default="train", help="split of the dataset (default: %(default)s)")
    add("--text-column", default="text", help="column of the dataset (default: %(default)s)")
    add("--min-frequency", type=int, default=2, help="least count of a pair (default: %(default)s)")
    add("--eos-token", choices=EOS_TOKENS, default=CHAT_EOS_TOKEN, help="ends an answer")
    add("--model-max-length", type=int, default=1_048_576, help="context length in tokens")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(**vars(parse_arguments()))
