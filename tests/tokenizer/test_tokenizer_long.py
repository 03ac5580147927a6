"""A megabyte of the same: no crash, tiktoken's ids, time in proportion; and where the limit is.

On a whole text tiktoken itself gives up at such lengths, so the expectation is put together from
pieces: the pattern says where a run is split, and tiktoken merges each piece, however long.
"""

import os
import time
from typing import Any

import pytest
from tokenizers_for_tests import Case, make_case, trained_ranks

from kimi_linear.tokenizer.text import MAX_RUN

CHARS = 1_000_000
LONGER_RUN = pytest.mark.skipif(
    "KIMI_LONG_TEXTS" not in os.environ, reason="a longer run: set KIMI_LONG_TEXTS=1"
)
# Runs that are one piece, whatever their length.
WHOLE = ("a", "A", " ", "\n", "!", "中", "\u0301", "<|")
MORE_WHOLE = ("\t", "[", "\r\n", "😀", "ʰ", "한")
# Runs that the pattern cuts into the same pieces again and again.
CUT = ("Aa", "777", "<|im_end|>")
MORE_CUT = ("1a", " a", "<|tool_call_end|>", "x\n", "don't", "中a")
# Four times the text takes four times as long, and somewhat more once tables outgrow the
# processor's caches; what is quadratic would take 16 times as long.
PART = 4
MOST_TIMES_AS_LONG = 10


def and_more(units: tuple[str, ...], more: tuple[str, ...]) -> list[Any]:
    """The units, and more of them for the longer run."""
    return [*units, *(pytest.param(unit, marks=LONGER_RUN) for unit in more)]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("trained", trained_ranks(), tmp_path_factory.mktemp("trained"))


def of_pieces(case: Case, pieces: list[str], times: int) -> list[int]:
    """tiktoken's ids of some pieces, so many times."""
    special = case.tokenizer.get_added_vocab()
    merged = case.reference._encode_single_piece
    return [
        token_id
        for piece in pieces
        for token_id in ([special[piece]] if piece in special else merged(piece))
    ] * times


def check_megabyte(case: Case, text: str, expected: list[int]) -> None:
    """Ids, text, and the time beside that of the text's first part."""
    short = text[: len(text) // PART]
    for _ in range(3):
        shortest = min(encoded_in(case, short)[0] for _ in range(2))
        seconds, ids = encoded_in(case, text)
        if seconds < MOST_TIMES_AS_LONG * shortest:
            break
    assert ids == expected
    assert case.tokenizer.decode(ids) == text
    assert seconds < MOST_TIMES_AS_LONG * shortest


def encoded_in(case: Case, text: str) -> tuple[float, list[int]]:
    """Seconds of this thread, and the ids."""
    start = time.thread_time()
    encoding = case.tokenizer.backend_tokenizer.encode(text)
    return time.thread_time() - start, encoding.ids


@pytest.mark.parametrize("unit", and_more(WHOLE, MORE_WHOLE))
def test_a_megabyte_of_one_piece(case: Case, unit: str) -> None:
    text = unit * (CHARS // len(unit))
    check_megabyte(case, text, of_pieces(case, [text], 1))


@pytest.mark.parametrize("unit", and_more(CUT, MORE_CUT))
def test_a_megabyte_of_many_pieces(case: Case, unit: str) -> None:
    pieces = {"1a": ["1", "a"], "x\n": ["x", "\n"], "中a": ["中", "a"]}.get(unit, [unit])
    times = CHARS // len(unit)
    check_megabyte(case, unit * times, of_pieces(case, pieces, times))


@pytest.mark.parametrize("unit", [*WHOLE, *MORE_WHOLE, *CUT, *MORE_CUT])
def test_tiktoken_itself_agrees_where_it_copes(case: Case, unit: str) -> None:
    """Also holds the pieces above to the pattern."""
    text = unit * (20_000 // len(unit))
    assert case.tokenizer(text).input_ids == case.reference.encode(text, allowed_special="all")


@pytest.mark.parametrize("digits", [1, 2])
def test_digits_are_counted_from_the_left(case: Case, digits: int) -> None:
    text = "7" * (3 * (CHARS // 3) + digits)
    thirds, rest = divmod(len(text), 3)
    expected = of_pieces(case, ["777"], thirds) + of_pieces(case, ["7" * rest], rest > 0)
    assert case.tokenizer(text).input_ids == expected


@LONGER_RUN
@pytest.mark.parametrize("prefix", ["", "\u0301", "a"])
@pytest.mark.parametrize("unit", ["A", " "])
def test_runs_up_to_the_limit(case: Case, prefix: str, unit: str) -> None:
    """A mark in front doubles the steps back: they are taken with it and without it."""
    text = prefix + unit * MAX_RUN + "!"
    assert case.tokenizer.decode(case.tokenizer(text).input_ids) == text


@LONGER_RUN
@pytest.mark.parametrize("text", ["\u0301" + "A" * 5_100_000, " " * 10_000_100 + "x"])
def test_why_there_is_a_limit(case: Case, text: str) -> None:
    """The engine's own limit; its exception is a BaseException, which servers do not expect."""
    with pytest.raises(BaseException, match="retry-limit-in-match over") as caught:
        case.tokenizer(text)
    assert not isinstance(caught.value, Exception)


@LONGER_RUN
@pytest.mark.parametrize("unit", ["a", "\n", "中", "Aa ", "<|im_end|>", "\u0301"])
def test_ten_megabytes(case: Case, unit: str) -> None:
    text = unit * (10_000_000 // len(unit.encode()))
    ids = case.tokenizer(text).input_ids
    assert case.tokenizer.decode(ids) == text
