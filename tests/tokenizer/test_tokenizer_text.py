"""Which texts are refused, how clearly, and what the tokenizer itself does with them."""

import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers_for_tests import BYTES, make_case

from kimi_linear.tokenizer.text import MAX_RUN, check_text

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


@pytest.mark.parametrize("text", ["", "a\U0010ffff", "\ue000\ufffd\uffff", "中" * 1000])
def test_valid_text_comes_back(text: str) -> None:
    assert check_text(text, "text") is text


@hypothesis.given(text=st.text(st.characters()))
def test_a_lone_surrogate_is_named_with_its_position(text: str) -> None:
    lone = [at for at, char in enumerate(text) if unicodedata.category(char) == "Cs"]
    if not lone:
        assert check_text(text, "text") is text
        return
    code = f"U\\+{ord(text[lone[0]]):04X}"
    with pytest.raises(ValueError, match=rf"^text has the .* {code} at character {lone[0]}; allow"):
        check_text(text, "text")


@pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), (b"a", "bytes"), (["a"], "list")])
def test_other_types(value: object, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"^messages\[2\] is of type {kind}; allowed: str"):
        check_text(value, "messages[2]")


@pytest.mark.parametrize("text", ["a\ud800b", "\ud83d\ude00"])
def test_the_tokenizer_itself_refuses_surrogates_less_clearly(tmp_path: Path, text: str) -> None:
    """A folder without custom code cannot say more; a surrogate pair in a str is none either."""
    tokenizer: Any = make_case("bytes", BYTES, tmp_path).tokenizer
    for call in (tokenizer, tokenizer.encode, tokenizer.tokenize, lambda t: tokenizer(["a", t])):
        with pytest.raises(TypeError, match="TextEncodeInput must be Union"):
            call(text)


@pytest.mark.parametrize(
    ("text", "kind", "start"),
    [
        ("x" + "A" * 5, "5 capital letters", 1),
        ("é" + "ǅ" * 5 + "b", "5 capital letters", 1),
        ("AAbcÉΩZAA7", "5 capital letters", 4),
        ("x\n" + " \u3000\t\x85 " + "\n", "5 white-space characters", 2),
    ],
)
def test_runs_that_the_pattern_cannot_match(text: str, kind: str, start: int) -> None:
    message = f"^text has {kind} in one run, from character {start}; allowed: at most 4$"
    with pytest.raises(ValueError, match=message):
        check_text(text, "text", max_run=4)
    check_text(text, "text", max_run=5)


@pytest.mark.parametrize("unit", ["AAAa", "a", "中", "\u0301", "\n", "7", "!", "   \n", "AAAA7"])
def test_other_runs_are_free(unit: str) -> None:
    check_text(unit * 9, "text", max_run=4)


def test_the_limit_is_checked_where_it_stands() -> None:
    check_text("A" * MAX_RUN, "text")
    with pytest.raises(ValueError, match=f"{MAX_RUN + 1} capital letters"):
        check_text("A" * (MAX_RUN + 1), "text")


@pytest.mark.parametrize("unit", ["a" * 8000 + "1", "a" * 20_000 + "\n", " " * 8000 + "x", "ACGT"])
def test_long_texts_are_checked_in_linear_time(unit: str) -> None:
    """A run was once tried again from each of its characters: minutes for a megabyte of DNA."""
    text = unit * (4_100_000 // len(unit))
    if unit == "ACGT":
        text = text[:3_900_000] + "1" + text[:300_000]
    started = time.process_time()
    assert check_text(text, "text") is text
    assert time.process_time() - started < 5
