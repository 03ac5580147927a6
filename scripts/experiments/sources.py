"""Python's source as one line of tokens with positions, kept on disk: the standard library, and if
more is wanted the packages that are installed.

Held out are the standard library's files that `texts/corpus.py` holds out. Packages' files of the
same name are left out, since some are copies.

Shapes: N tokens of the whole text, B rows of T tokens.
"""

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from learning.tokens import special_ids
from measuring.report import say
from texts.corpus import (
    first_bytes,
    installed_packages,
    name_hash,
    split_by_file,
    standard_library,
    total_bytes,
)
from texts.evaluation import encode_texts
from torch import Tensor

from kimi_linear.tokenizer import convert_tiktoken, train_bpe

TOKENIZER_BYTES = 24_000_000


@dataclass(frozen=True)
class Sources:
    """Tokens of training files, and of each held-out file.

    Attributes:
        train: [N] int32, each file behind a begin token and with its end token.
        held_out: Of each file, the begin token, its tokens, the end token.
        held_out_bytes: Of each file, in UTF-8.
        special: Fields of the configuration.
    """

    train: Tensor
    held_out: list[list[int]]
    held_out_bytes: list[int]
    special: dict[str, Any]

    @classmethod
    def load(
        cls, folder: Path, vocab_size: int, root: Path | None = None, packages: float = 0
    ) -> "Sources":
        """Read, train a tokenizer and encode; or read what an earlier call left in the folder.

        Args:
            folder: Where that is kept.
            vocab_size: Ids, at least 512.
            root: Folder of Python files; None: the running interpreter's library.
            packages: Megabytes of installed packages' files.

        Raises:
            ValueError: For a folder without such files, or a `vocab_size` out of range.
        """
        wanted = {"vocab_size": vocab_size, "root": str(root), "packages": packages}
        file = folder / "tokens.pt"
        if file.exists():
            found = torch.load(file)
            if found.pop("wanted") == wanted:
                return cls(**found)
        made = cls._made(vocab_size, root, packages)
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_name("tokens.part")
        torch.save({"wanted": wanted, **vars(made)}, part)
        part.replace(file)
        return made

    @classmethod
    def _made(cls, vocab_size: int, root: Path | None, packages: float) -> "Sources":
        kept, held_out = split_by_file(standard_library(root))
        names = {Path(file.name).name for file in held_out}
        kept += first_bytes(installed_packages(names), 1e6 * packages)
        kept.sort(key=lambda file: name_hash(file.name))  # packages' files among the others
        say(f"{len(kept)} files, {total_bytes(kept) / 1e6:.1f} MB, and {len(held_out)} held out")
        ranks = train_bpe((file.text for file in first_bytes(kept, TOKENIZER_BYTES)), vocab_size)
        with tempfile.TemporaryDirectory() as place:
            tokenizer = convert_tiktoken(ranks, place, eos_token="[EOS]")
            begin = tokenizer.bos_token_id
            train, test = (
                [[begin, *ids] for ids in encode_texts(tokenizer, [file.text for file in files])]
                for files in (kept, held_out)
            )
        tokens = torch.tensor(list(itertools.chain(*train)), dtype=torch.int32)
        say(f"{len(tokens):,} tokens for training")
        return cls(tokens, test, [file.num_bytes for file in held_out], special_ids(tokenizer))

    def rows(
        self, count: int, length: int, seed: int, repeats: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Ids and positions [count, length] int64 of pieces from random places; positions restart
        where a file begins. With probability `repeats` a row says its beginning, 16 tokens to half
        of it, again and again, as one text: minutes of training make a model that copies."""
        generator = torch.Generator().manual_seed(seed)
        most = len(self.train) - length
        if most < 0:
            raise ValueError(
                f"--length {length} is not allowed: the text has {len(self.train)} tokens"
            )
        starts = torch.randint(most + 1, (count, 1), generator=generator)
        places = torch.arange(length).repeat(count, 1)
        is_repeating = torch.rand(count, 1, generator=generator) < repeats
        ratio = torch.rand(count, 1, generator=generator)
        periods = 16 * (length / 32) ** ratio  # short ones, which are learned first, as often
        places = torch.where(is_repeating, places % periods.long(), places)
        ids = self.train[starts + places].long()
        positions = positions_of(ids, self.special["bos_token_id"])
        return ids, torch.where(is_repeating, torch.arange(length), positions)


def positions_of(ids: Tensor, begin: int) -> Tensor:
    """[B, T]: each token's place in its file, the first one's counted from the row's beginning."""
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = torch.where(ids == begin, place, 0)
    return place - starts.cummax(dim=1).values
