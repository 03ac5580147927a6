"""Text for the experiments: the source of Python's standard library as one line of tokens.

Files come one after the other, each with its end token; whole files are held out by
`texts/corpus.py`. The tokenizer is trained on the others.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from texts.corpus import SourceFile, split_by_file, standard_library, total_bytes
from texts.evaluation import encode_texts
from torch import Tensor

from kimi_linear.tokenizer import convert_tiktoken, train_bpe


@dataclass(frozen=True)
class Corpus:
    """Tokens of a corpus.

    Attributes:
        train, held_out: [N] int64 each.
        train_bytes, held_out_bytes: Of the texts, in UTF-8.
        vocab_size: Ids, special ones among them.
    """

    train: Tensor
    held_out: Tensor
    train_bytes: int
    held_out_bytes: int
    vocab_size: int

    @classmethod
    def load(cls, vocab_size: int, root: Path | None = None) -> "Corpus":
        """Read, train a tokenizer, and encode.

        Args:
            vocab_size: Ids, at least 512.
            root: A folder of Python files; None: the running interpreter's library.

        Raises:
            ValueError: For a folder without such files, or a `vocab_size` out of range.
        """
        kept, held_out = split_by_file(standard_library(root))
        # files of one package stand side by side by name, which a reader by pieces would notice
        random.Random(0).shuffle(kept)
        ranks = train_bpe((file.text for file in kept), vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = convert_tiktoken(ranks, folder, eos_token="[EOS]")

            def tokens(files: Sequence[SourceFile]) -> Tensor:
                encoded = encode_texts(tokenizer, [file.text for file in files])
                return torch.tensor([i for ids in encoded for i in ids])

            parts = tokens(kept), tokens(held_out)
        return cls(*parts, total_bytes(kept), total_bytes(held_out), len(tokenizer))

    def to(self, device: torch.device) -> "Corpus":
        """The same with its tokens on a device."""
        moved = {"train": self.train.to(device), "held_out": self.held_out.to(device)}
        return replace(self, **moved)


def random_pieces(tokens: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Pieces [count, length] from random places, on the generator's device."""
    if len(tokens) < length:
        raise ValueError(f"length {length} is not allowed: the text has {len(tokens)} tokens")
    starts = torch.randint(
        len(tokens) - length + 1, (count, 1), generator=generator, device=tokens.device
    )
    return tokens[starts + torch.arange(length, device=tokens.device)]


def rows_of(tokens: Tensor, length: int) -> Tensor:
    """All of the text in rows [N, length], one after the other; what remains is left out."""
    count = len(tokens) // length
    return tokens[: count * length].view(count, length)
