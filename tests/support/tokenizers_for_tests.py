"""Vocabularies, texts and tiktoken over the same ranks, for the tests of the tokenizer."""

import functools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kimi_linear.tokenizer.convert import bytes_to_chars, convert_tiktoken, make_pre_tokenizer
from kimi_linear.tokenizer.special_tokens import PATTERN, special_token_ids
from kimi_linear.tokenizer.train import train_bpe

BYTES = {bytes([byte]): byte for byte in range(256)}
LIBRARY = Path(json.__file__).parent.parent
# The size above which Transformers may exchange a tokenizer's pattern for another.
LARGE_VOCABULARY = 100_000

CONTRACTIONS = (
    *("'s", "'T", "'re", "'VE", "'m", "'LL", "'d", "'ſ", "’s", "don't", "WE'LL", "ÉTÉ'S", "中'S"),
)
WHITE_SPACE = (
    *(" ", "  ", "\t", "\u3000", "\u00a0", "\u2003", "\u200b", " " * 40, "\t" * 17, " \t" * 30),
)
NEWLINES = ("\n", "\r\n", "\r", "\n" * 9, "\u2028", "\u2029", "\x85", "\v", "\f", " \n", "\n  ")
DIGITS = ("1234567", "3.14", "١٢٣٤", "४५६७", "๑๒๓", "1٢३", "½", "Ⅷ", "²³", "〇", "三千", "𝟘𝟙𝟚𝟛")
MARKS = (
    *(
        "e\u0301",
        "\u0301",
        "n\u0303o",
        "\u0301" * 20,
        "\u302a",
        "\U00016ff0",
        "क्षि",
        "ก็",
        "A\u0300B",
    ),
)
EMOJI = ("👨\u200d👩\u200d👧", "👩\u200d🚀", "🇩🇪🇫🇷🇯", "👍🏽", "✨", "❤️\u200d🔥", "🏴󠁧󠁢󠁷󠁬󠁳󠁿", "1️⃣")
SPECIAL_TEXT = (
    *("[BOS]", "[EOS]", "[PAD]", "<|im_end|>", "<|im_user|>", "<|im_middle|>", "<|tool_call_end|>"),
    *("<|reserved_token_5|>", "<|", "|>", "<|im_", "[BO", "<|IM_END|>", "<|im_end|", "[[BOS]]"),
)
SCRIPTS = (
    *(
        "中文",
        "月之暗面",
        "々",
        "ー",
        "カナ",
        "한국",
        "a中B文c",
        "中a",
        "Zß中",
        "Ελληνικά",
        "ΚΑΙ",
        "привет",
    ),
    *("ǅ", "ʰ", "ª", "שלום", "नमस्ते", "𠮷𪚥", "𐐀𐐨", "def f(x):", "self."),
    *("HTTPServer", "!?\n", "…"),
)
FRAGMENTS = (
    *CONTRACTIONS,
    *WHITE_SPACE,
    *NEWLINES,
    *DIGITS,
    *MARKS,
    *EMOJI,
    *SPECIAL_TEXT,
    *SCRIPTS,
)


def text_strategy() -> Any:
    """Texts for hypothesis: fragments, its own characters, and code points of every plane."""
    st = pytest.importorskip("hypothesis").strategies
    # A code point of any plane with equal chance; hypothesis by itself prefers the first.
    point = st.builds(
        lambda plane, low: plane << 16 | low, st.integers(0, 16), st.integers(0, 0xFFFF)
    )
    char = point.map(lambda point: chr(0xE000 if 0xD800 <= point < 0xE000 else point))
    pieces = st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=6), char)
    return st.lists(pieces, max_size=8).map("".join)


def reference_of(ranks: dict[bytes, int]) -> Any:
    """tiktoken over the ranks, with the 256 special ids."""
    tiktoken = pytest.importorskip("tiktoken")
    special = special_token_ids(len(ranks))
    return tiktoken.Encoding(
        "reference", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def auto_load(folder: Path) -> Any:
    """What `AutoTokenizer` makes of a folder, without the network and without trust."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@functools.cache
def trained_ranks() -> dict[bytes, int]:
    """Ranks trained on source and on the fragments, so that most scripts have merges."""
    texts = [(LIBRARY / "argparse.py").read_text(encoding="utf-8")]
    return train_bpe(texts + [f * 20 for f in FRAGMENTS], 2000, show_progress=False)


def shuffled_ranks(seed: int) -> dict[bytes, int]:
    """The trained tokens, single bytes included, in another order: most are out of reach."""
    tokens = list(trained_ranks())
    random.Random(seed).shuffle(tokens)
    return {token: rank for rank, token in enumerate(tokens)}


def substring_ranks(seed: int) -> dict[bytes, int]:
    """Random byte strings of the fragments, halves of characters too, behind the single bytes."""
    rng = random.Random(seed)
    data = [fragment.encode() for fragment in FRAGMENTS if fragment not in SPECIAL_TEXT]
    cuts = ((rng.choice(data), rng.randint(0, 6), rng.randint(2, 7)) for _ in range(6000))
    found = {piece[start : start + size] for piece, start, size in cuts}
    tokens = sorted(token for token in found if len(token) > 1)
    rng.shuffle(tokens)
    return {token: rank for rank, token in enumerate([*BYTES, *tokens])}


def whole_piece_ranks() -> dict[bytes, int]:
    """Whole pieces of the pattern, and no pair that would merge into one."""
    spell = {char: byte for byte, char in bytes_to_chars().items()}
    pre = make_pre_tokenizer()
    text = "".join(f + " " for f in FRAGMENTS) + (LIBRARY / "ast.py").read_text(encoding="utf-8")
    pieces = {bytes(spell[c] for c in piece) for piece, _ in pre.pre_tokenize_str(text)}
    whole = sorted(piece for piece in pieces if len(piece) > 2)
    return {token: rank for rank, token in enumerate([*BYTES, *whole])}


@functools.cache
def large_ranks() -> dict[bytes, int]:
    """More than 100,000 ranks without training: all pairs of bytes, then words' beginnings."""
    words = set()
    for name in ("argparse", "ast", "typing", "inspect", "tarfile", "subprocess", "turtle"):
        text = (LIBRARY / f"{name}.py").read_text(encoding="utf-8")
        words.update(re.findall(r" ?[A-Za-z]{3,}", text))
    rng = random.Random(0)
    others = [
        chr(c) for c in (*range(0x4E00, 0x5000), *range(0x400, 0x460), *range(0x1F600, 0x1F640))
    ]
    words.update("".join(rng.choices(others, k=4)) for _ in range(12_000))
    starts = {word.encode()[:size] for word in words for size in range(3, len(word.encode()) + 1)}
    pairs = [bytes((a, b)) for a in range(256) for b in range(256)]
    tokens = [*BYTES, *pairs, *sorted(starts, key=lambda token: (len(token), token))]
    return {token: rank for rank, token in enumerate(tokens[: LARGE_VOCABULARY + 5000])}


@dataclass(frozen=True)
class Case:
    """A vocabulary in both forms."""

    name: str
    ranks: dict[bytes, int]
    tokenizer: Any
    reference: Any
    # Bytes of every id, the special ones included.
    token_bytes: list[bytes]


def make_case(name: str, ranks: dict[bytes, int], folder: Path) -> Case:
    """Convert ranks into a folder and load it back with `AutoTokenizer`."""
    convert_tiktoken(ranks, folder)
    table = [token for token, _ in sorted(ranks.items(), key=lambda item: item[1])]
    table += [text.encode() for text in special_token_ids(len(ranks))]
    return Case(name, ranks, auto_load(folder), reference_of(ranks), table)
