"""Text on a terminal: whatever a model writes, it commands nothing."""

import contextlib
import io
import sys

# Each is one character, so that a sequence that comes in pieces is found like a whole one.
_CONTROLS = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))} - {"\n", "\t"}
_DIRECTIONS = {"\u061c", "\u200e", "\u200f"}.union(
    map(chr, range(0x202A, 0x202F)), map(chr, range(0x2066, 0x206A))
)
_ESCAPES = str.maketrans({c: c.encode("unicode_escape").decode() for c in _CONTROLS | _DIRECTIONS})


def shown(text: str) -> str:
    """A text for a terminal that it cannot command: control characters (C0 and C1, newline and tab
    excepted) and Unicode's controls of direction come out as Python would write them."""
    return text.translate(_ESCAPES)


def tolerate_any_text() -> None:
    """Have stdout show "?" for what its encoding lacks, not fail in the middle of an answer."""
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
