"""Tell the special tokens that a template writes from text that spells them.

A special token is a string, so whoever may put text into a prompt could put `<|im_end|>` there and
end their turn. Behind each character of that text with which a special token could begin goes a
mark, a character that occurs nowhere else; the template does its work on the marked text; what it
then holds of special tokens is its own, and the marks are taken out.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the 256 special tokens begin with. Tokens that a user added and that begin with anything else
# are words: a template writes none of them.
TOKEN_BEGINNINGS: Final[str] = "<["
# Lists and mappings in each other: far from Python's limit, which reading and writing JSON share.
MAX_LEVELS: Final[int] = 128
# The last two planes of private use: Unicode gives these characters no meaning.
_CANDIDATES = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


def unused_character(texts: Iterable[str]) -> str:
    """A character that none of the texts has.

    Raises:
        ValueError: The texts have all 131,068 characters of Unicode's private planes.
    """
    used = set().union(*texts)
    mark = next((chr(point) for point in _CANDIDATES if chr(point) not in used), None)
    if mark is None:
        raise ValueError(
            "the texts hold every character of Unicode's private planes; leave one out"
        )
    return mark


def special_tokens_pattern(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """What matches the tokens that a template can write."""
    return _pattern(tuple(tokenizer.get_added_vocab()))


@functools.lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    names = tuple(name for name in names if name[0] in TOKEN_BEGINNINGS)
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def mark_beginnings(text: str, mark: str) -> str:
    """Mark each place where a token could begin, whatever is put behind the text."""
    for first in TOKEN_BEGINNINGS:
        text = text.replace(first, first + mark)
    return text


def map_strings(
    value: Any, function: Callable[[str, str], str], where: str, *, levels: int = MAX_LEVELS
) -> Any:
    """Copy JSON-like data with every string in it replaced, keys of objects included.

    Args:
        value: None, a boolean, a number, a string, or lists and mappings of them.
        function: Gets each string and the path that leads to it.
        where: The path of `value`, for instance "messages".
        levels: How many lists and mappings may lie in each other.

    Returns:
        The copy, of dicts and lists.

    Raises:
        ValueError: Anything else is in it, or too many levels; the message names its path.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return function(value, where)
    if isinstance(value, Mapping | list | tuple) and levels == 0:
        raise ValueError(f"{where[:60]}... is nested too deeply; allowed: {MAX_LEVELS} levels")
    inner = functools.partial(map_strings, function=function, levels=levels - 1)
    if isinstance(value, Mapping):
        return {
            inner(key, where=f"{where} (key)"): inner(item, where=f"{where}.{key}")
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [inner(item, where=f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"{where} is of type {type(value).__name__}; allowed: dict, list, str, number, bool, None"
    )
