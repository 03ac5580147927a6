"""Train a byte-level BPE vocabulary with the Kimi Linear pre-tokenizer, in tiktoken's form.

The merges are counted by the Rust trainer of `tokenizers`. Ties in the counts are broken by the
tokens' order of creation, so equal texts give equal vocabularies, on any number of threads.
"""

import sys
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from kimi_linear.tokenizer.byte_level import bytes_to_chars, chars_to_bytes
from kimi_linear.tokenizer.convert import make_pre_tokenizer
from kimi_linear.tokenizer.special_tokens import NUM_SPECIAL_TOKENS
from kimi_linear.tokenizer.text import check_text

MIN_VOCAB_SIZE = 256 + NUM_SPECIAL_TOKENS


def train_bpe(
    texts: Iterable[str], vocab_size: int, show_progress: bool = True, *, min_frequency: int = 2
) -> dict[bytes, int]:
    """Train a byte-level BPE of a given size.

    Args:
        texts: the training texts, read once. Tokens never span two texts.
        vocab_size: ids of the finished tokenizer, the 256 special ids among them; at least 512.
        show_progress: draw progress bars on stderr when it is a terminal.
        min_frequency: how often a pair must occur to become a token; at least 1.

    Returns:
        Token bytes to rank, `vocab_size - 256` of them: the single bytes at their own values, then
        the merges in the order in which they were learned.

    Raises:
        ValueError: an argument is out of range, a text cannot be tokenized (see `check_text`), or
            the texts hold too few repeated pairs for `vocab_size`.
    """
    if not isinstance(vocab_size, int) or vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size!r}; allowed: an integer of at least {MIN_VOCAB_SIZE} "
            f"(256 bytes and {NUM_SPECIAL_TOKENS} special ids)"
        )
    if not isinstance(min_frequency, int) or min_frequency < 1:
        raise ValueError(f"min_frequency is {min_frequency!r}; allowed: an integer of at least 1")
    one_text = isinstance(texts, str | bytes)
    if one_text:
        raise ValueError(f"texts is one {type(texts).__name__}; allowed: an iterable of str")
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = make_pre_tokenizer()
    trainer = BpeTrainer(
        vocab_size=vocab_size - NUM_SPECIAL_TOKENS,
        min_frequency=min_frequency,
        # Off a terminal the trainer would print blank lines to stdout.
        show_progress=show_progress and sys.stderr.isatty(),
        initial_alphabet=list(bytes_to_chars().values()),
    )
    tokenizer.train_from_iterator(_checked(texts), trainer)
    ranks = _ranks_of(tokenizer)
    reached = len(ranks) + NUM_SPECIAL_TOKENS
    if reached != vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the texts have pairs that occur at least "
            f"{min_frequency} times for {reached} only; give more text, a smaller vocab_size or a "
            "smaller min_frequency"
        )
    return ranks


def _checked(texts: Iterable[str]) -> Iterator[str]:
    """The texts, each checked to be one that can be tokenized."""
    for index, text in enumerate(texts):
        yield check_text(text, f"texts[{index}]")


def _ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Ranks of a trained tokenizer: single bytes by value, merges by the order of their ids."""
    to_byte = chars_to_bytes()
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(to_byte[char] for char in token) for token, _ in learned if len(token) > 1]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks.update((token, 256 + index) for index, token in enumerate(merged))
    return ranks
