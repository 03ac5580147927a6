"""What can be tokenized: text that UTF-8 can carry, without runs that the pattern cannot match.

The regex engine of `tokenizers` gives up on a match after 10,000,000 steps back. Two kinds of runs
take one or two steps for every character: capital letters (the pattern looks for a small letter
behind them) and white space (it looks for a newline). The fast tokenizer then panics, with an
exception that is no `Exception`. Runs of other characters, or of capitals with a small letter, a
mark or a letter without case at their end, have no such limit.
"""

import functools
import itertools
import re
import unicodedata
from typing import Final

# Two steps for a character where a mark stands before the run, and room to spare.
MAX_RUN: Final[int] = 4_000_000


def check_text(text: object, where: str, *, max_run: int = MAX_RUN) -> str:
    """Check that a text can be tokenized, and say what is wrong with it where it can't.

    The tokenizer itself answers a lone surrogate with a TypeError about its input's type, and
    tiktoken replaces it without a word.

    Args:
        text: what should be a str of valid Unicode text, of any length.
        where: what the error calls it, for instance `texts[3]`.
        max_run: how many capital letters, or white-space characters other than newlines, may stand
            in one run; at least 1.

    Returns:
        The text as it is.

    Raises:
        ValueError: not a str; a lone surrogate; a run longer than `max_run`. Positions are in
            characters, from 0.
    """
    if not isinstance(text, str):
        raise ValueError(f"{where} is of type {type(text).__name__}; allowed: str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        lone = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise ValueError(
            f"{where} has the lone surrogate {lone}; allowed: text that UTF-8 can carry"
        ) from None
    if len(text) > max_run:
        _check_runs(text, where, max_run)
    return text


def _check_runs(text: str, where: str, max_run: int) -> None:
    """Refuse what the pattern cannot match."""
    for match in _long_runs(max_run).finditer(text):
        run = match.group()
        start = match.start()
        if run.isspace():
            _refuse_run(where, len(run), "white-space characters", start, max_run)
        for capital, group in itertools.groupby(run, _is_capital):
            size = sum(1 for _ in group)
            if capital and size > max_run:
                _refuse_run(where, size, "capital letters", start, max_run)
            start += size


@functools.cache
def _long_runs(max_run: int) -> re.Pattern[str]:
    """Runs of white space, or of letters: which of them are capitals `re` cannot say."""
    return re.compile(rf"[^\S\r\n]{{{max_run + 1},}}|[^\W\d_]{{{max_run + 1},}}")


def _is_capital(char: str) -> bool:
    """Whether the pattern takes a letter for the beginning of a word only."""
    return unicodedata.category(char) in ("Lu", "Lt")


def _refuse_run(where: str, size: int, kind: str, start: int, max_run: int) -> None:
    raise ValueError(
        f"{where} has {size} {kind} in one run, from character {start}; allowed: at most {max_run}"
    )
