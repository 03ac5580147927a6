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
from collections.abc import Sequence
from pathlib import Path

from texts.files import CountedTexts, find_files, read_dataset, read_files

from kimi_linear.tokenizer.convert import convert_tiktoken
from kimi_linear.tokenizer.special_tokens import CHAT_EOS_TOKEN, EOS_TOKENS
from kimi_linear.tokenizer.train import train_bpe


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
