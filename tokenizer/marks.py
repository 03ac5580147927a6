"""Tell the special tokens that a program writes from text that spells them.

A special token is a string, so whoever may put text into a prompt could put `<|im_end|>` there and
end their turn, and a model that repeats such text would seem to have called a tool. Both sides are
mended by a mark: a character that occurs nowhere else is put behind the first character of every
special token that is only spelled, the text goes through whatever works on strings (a template, a
parser), and the marks are taken out at the end.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """What matches any token that a tokenizer looks for before it splits text into words."""
    return _pattern(tuple(tokenizer.get_added_vocab()))


@functools.lru_cache(maxsize=8)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def mark_beginnings(text: str, names: Iterable[str], mark: str) -> str:
    """Put the mark behind each character that one of `names` begins with, in a token or not.

    So no token can begin in this text, whatever is put behind it.
    """
    for first in sorted({name[0] for name in names}):
        text = text.replace(first, first + mark)
    return text


def mark_tokens(text: str, pattern: re.Pattern[str], mark: str) -> str:
    """Put the mark behind the first character of each match."""
    return pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)


def map_strings(value: Any, function: Callable[[str, str], str], where: str) -> Any:
    """Copy JSON-like data with every string in it replaced, keys of objects included.

    Args:
        value: None, a boolean, a number, a string, or lists and mappings of them.
        function: Gets each string and the path that leads to it.
        where: The path of `value`, for instance "messages".

    Returns:
        The copy, of dicts and lists.

    Raises:
        ValueError: Anything else is in it; the message names its path.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return function(value, where)
    if isinstance(value, Mapping):
        return {
            map_strings(key, function, f"{where} (key)"): map_strings(
                item, function, f"{where}.{key}"
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [map_strings(item, function, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(
        f"{where} is of type {type(value).__name__}; allowed: dict, list, str, number, bool, None"
    )
