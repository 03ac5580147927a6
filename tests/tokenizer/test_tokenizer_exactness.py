"""Ids, decoding and offsets equal tiktoken's on every text, over vocabularies of every kind.

hypothesis makes a few hundred texts itself. For tens of thousands it chooses the seeds of batches
only; it could shrink neither seeds nor batches, so the text that fails is made shorter here.
"""

import bisect
import json
import os
import random
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from tokenizers_for_tests import (
    BYTES,
    EMOJI,
    FRAGMENTS,
    LARGE_VOCABULARY,
    NEWLINES,
    SPECIAL_TEXT,
    Case,
    auto_load,
    large_ranks,
    make_case,
    shuffled_ranks,
    substring_ranks,
    text_strategy,
    trained_ranks,
    whole_piece_ranks,
)

from kimi_linear.tokenizer.convert import make_pre_tokenizer
from kimi_linear.tokenizer.special_tokens import NOT_SPECIAL

hypothesis = pytest.importorskip("hypothesis")
tiktoken = pytest.importorskip("tiktoken")
st = hypothesis.strategies

# Each over all vocabularies; KIMI_TEXTS=200000 for a longer run.
NUM_TEXTS = int(os.environ.get("KIMI_TEXTS", "20000"))
BATCH = 100
VOCABULARIES: dict[str, Callable[[], dict[bytes, int]]] = {
    "bytes": lambda: BYTES,
    "trained": trained_ranks,
    "shuffled": lambda: shuffled_ranks(0),
    "substrings": lambda: substring_ranks(1),
    "whole_pieces": whole_piece_ranks,
    "large": large_ranks,
}


def _category(*names: str) -> list[str]:
    """All characters of some general categories."""
    points = range(sys.maxunicode + 1)
    return [chr(c) for c in points if unicodedata.category(chr(c)) in names]


def _plane_char(rng: random.Random) -> str:
    """A code point of any plane with equal chance."""
    point = rng.randrange(17) << 16 | rng.randrange(0x10000)
    return chr(point if not 0xD800 <= point < 0xE000 else 0xE000)


def _run(rng: random.Random, units: str) -> str:
    return rng.choice(units) * rng.randint(1, 60)


def _some(rng: random.Random, units: Sequence[str], size: int) -> str:
    return "".join(rng.choices(units, k=rng.randint(1, size)))


COMBINING = _category("Mn", "Mc", "Me")
NUMBERS = _category("Nd", "Nl", "No")
WORDS = ("", "a", "Don", "É", "中", "7", " ", "ʰ", "\u0301")
ENDINGS = (
    *("s", "S", "t", "T", "re", "Re", "rE", "RE", "ve", "VE", "Ve", "m", "M", "ll", "LL", "lL"),
    *("d", "D", "ſ", "x", "rev"),
)
KINDS: dict[str, Callable[[random.Random], str]] = {
    "planes": lambda rng: "".join(_plane_char(rng) for _ in range(rng.randint(1, 4))),
    "han_latin": lambda rng: _some(rng, "aZéß中月々〇𠮷 ", 8),
    "marks": lambda rng: rng.choice(("", "e", "A", "中", " ", "1")) + _some(rng, COMBINING, 3),
    "contractions": lambda rng: rng.choice(WORDS) + rng.choice("'’＇") + rng.choice(ENDINGS),
    "digits": lambda rng: _some(rng, NUMBERS, 7),
    "white_space": lambda rng: _run(rng, " \t\u3000\u00a0"),
    "newlines": lambda rng: rng.choice((_run(rng, "\n\r"), _some(rng, NEWLINES, 3))),
    "special": lambda rng: rng.choice(SPECIAL_TEXT),
    "emoji": lambda rng: rng.choice(EMOJI),
    "runs": lambda rng: _run(rng, "aAé7!中가\u0301"),
    "fragments": lambda rng: rng.choice(FRAGMENTS),
}


def random_texts(seed: int) -> list[str]:
    """A batch of texts of 1 to 6 pieces; the same for the same seed."""
    rng = random.Random(seed)
    kinds = list(KINDS.values())
    sizes = [rng.randint(1, 6) for _ in range(BATCH)]
    return ["".join(rng.choice(kinds)(rng) for _ in range(size)) for size in sizes]


TEXTS = text_strategy()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    root = tmp_path_factory.mktemp("vocabularies")
    return [make_case(name, make(), root / name) for name, make in VOCABULARIES.items()]


def check_batch(case: Case, texts: list[str], *, ids_only: bool = False) -> None:
    """Compare a batch at once; of the first text that differs, report a part as short as can be."""
    if ids_only:
        expected = [case.reference.encode(text, allowed_special="all") for text in texts]
        if case.tokenizer(texts).input_ids == expected:
            return
    failing = next((text for text, problem in problems(case, texts) if problem), None)
    if failing is not None:
        short = shortened(failing, lambda text: any(p for _, p in problems(case, [text])))
        problem = next(problem for _, problem in problems(case, [short]))
        pytest.fail(f"{case.name}, {short!r}: {problem}", pytrace=False)


def shortened(text: str, fails: Callable[[str], bool]) -> str:
    """Leave characters out, many at first, for as long as the rest still fails."""
    size = max(1, len(text) // 2)
    at = 0
    while True:
        rest = text[:at] + text[at + size :]
        if rest != text and fails(rest):
            text = rest
            continue
        at += size
        if at >= len(text):
            if size == 1:
                return text
            size, at = size // 2, 0


def problems(case: Case, texts: list[str]) -> Iterator[tuple[str, str]]:
    """Each text, and what is wrong with it: an empty string for nothing."""
    encoded = case.tokenizer(texts, return_offsets_mapping=True)
    plain = case.tokenizer(texts, split_special_tokens=True).input_ids
    decoded = case.tokenizer.batch_decode(encoded.input_ids)
    rows = zip(texts, encoded.input_ids, encoded.offset_mapping, plain, decoded, strict=True)
    for text, ids, offsets, plain_ids, back in rows:
        expected = case.reference.encode(text, allowed_special="all")
        # Off are the tokens flagged special; those of tool calls are not, and stay tokens.
        ordinary = case.reference.encode(text, allowed_special=NOT_SPECIAL, disallowed_special=())
        slices = list(expected_offsets(text, [case.token_bytes[i] for i in ids]))
        if ids != expected:
            yield text, f"ids {ids}, tiktoken {expected}"
        elif plain_ids != ordinary:
            yield text, f"plain ids {plain_ids}, tiktoken {ordinary}"
        elif back != text:
            yield text, f"decoded {back!r}"
        elif offsets != slices:
            yield text, f"offsets {offsets}, by its bytes {slices}"
        else:
            yield text, ""


def expected_offsets(text: str, tokens: list[bytes]) -> Iterator[tuple[int, int]]:
    """Characters that a token's bytes touch: a part of a character counts as the character."""
    ends = list(accumulate(len(char.encode()) for char in text))
    stops = accumulate(map(len, tokens))
    for token, stop in zip(tokens, stops, strict=True):
        start = stop - len(token)
        yield bisect.bisect_right(ends, start), bisect.bisect_left(ends, stop) + 1


class TestEveryText:
    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(text=TEXTS)
    def test_texts_that_hypothesis_makes(self, cases: list[Case], text: str) -> None:
        for case in cases:
            check_batch(case, [text])

    @pytest.mark.parametrize(
        "num_texts", [NUM_TEXTS // 4, pytest.param(NUM_TEXTS, marks=pytest.mark.slow)]
    )
    def test_many_texts(self, cases: list[Case], num_texts: int) -> None:
        seen = set[str]()

        # Some texts come twice, and only different ones count.
        @hypothesis.settings(
            max_examples=num_texts // BATCH * 5 // 4,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(seed=st.integers(0, 2**64 - 1))
        def check(seed: int) -> None:
            if len(seen) < num_texts:
                texts = random_texts(seed)
                for case in cases:
                    check_batch(case, texts, ids_only=case is not cases[seed % len(cases)])
                seen.update(texts)

        check()
        assert len(seen) >= num_texts
        assert {ord(char) >> 16 for text in seen for char in text} == set(range(17))

    def test_fragments(self, cases: list[Case]) -> None:
        """Every fragment beside every other, which chance need not bring together."""
        texts = [left + right for left in FRAGMENTS for right in FRAGMENTS]
        for index, case in enumerate(cases):
            check_batch(case, texts, ids_only=index > 0)

    def test_a_failure_is_reported_by_one_short_text(self, cases: list[Case]) -> None:
        """Planted: a tokenizer that loses a digit behind Han."""

        class Broken:
            def __call__(self, texts: list[str], **options: Any) -> Any:
                return cases[0].tokenizer([t.replace("中7", "中") for t in texts], **options)

            def __getattr__(self, name: str) -> Any:
                return getattr(cases[0].tokenizer, name)

        broken = Case("broken", BYTES, Broken(), cases[0].reference, cases[0].token_bytes)
        texts = ["fine", "".join(FRAGMENTS) + "中7" + "".join(FRAGMENTS), "中7"]
        with pytest.raises(pytest.fail.Exception, match="^broken, '中7': ids"):
            check_batch(broken, texts)


class TestEngines:
    @pytest.mark.parametrize(
        "pattern",
        [
            r"\p{Han}",
            r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
            r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
            r"\p{L}",
            r"\p{N}",
            r"\s",
            r"(?i:[stremlvd])",
        ],
    )
    def test_agree_on_every_code_point(self, pattern: str) -> None:
        points = (*range(0xD800), *range(0xE000, sys.maxunicode + 1))
        text = "".join(map(chr, points))
        encoding = tiktoken.Encoding(
            "class", pat_str=pattern, mergeable_ranks=BYTES, special_tokens={}
        )
        matched = encoding.decode(encoding.encode_ordinary(text))
        split = Split(Regex(f"(?:{pattern})+"), behavior="removed")
        unmatched = "".join(piece for piece, _ in split.pre_tokenize_str(text))
        assert len(matched) > 0
        assert set(matched).isdisjoint(unmatched)
        assert len(matched) + len(unmatched) == len(text)


class TestLargeVocabulary:
    """Above 100,000 ids Transformers looks whether it should exchange the pattern for another."""

    # The exchanged pattern has single digits, no Han class and no contractions.
    TEXT = "don't 12345 a中B文c x/\n\n WE'LL <|im_end|> 月之暗面abc 1234567"

    @pytest.mark.parametrize(
        "config",
        [
            None,
            {"model_type": "kimi_linear"},
            {"model_type": "kimi_linear", "transformers_version": "4.57.1"},
            {"model_type": "kimi_linear", "transformers_version": "5.17.0"},
            {"transformers_version": "4.57.1"},
            {},
        ],
    )
    @pytest.mark.transformers
    def test_pattern_and_ids_stay(
        self, cases: list[Case], tmp_path: Path, config: dict[str, str] | None
    ) -> None:
        large = next(case for case in cases if case.name == "large")
        assert len(large.ranks) > LARGE_VOCABULARY
        large.tokenizer.save_pretrained(tmp_path)
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = auto_load(tmp_path)
        state = loaded.backend_tokenizer.pre_tokenizer.__getstate__()
        assert state == make_pre_tokenizer().__getstate__()
        expected = large.reference.encode(self.TEXT, allowed_special="all")
        assert loaded(self.TEXT).input_ids == expected
