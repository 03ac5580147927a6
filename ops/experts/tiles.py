"""Tiles of rows that are sorted by expert.

A program makes one tile of one expert. How many tiles an expert has is read from `ends` by every
program, so that the host never waits for it; programs beyond the last tile do nothing.
"""

# mypy: disable-error-code=no-untyped-def

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.ops.runtime import ceil_div, jit, tl


def tiles_of(num_rows: int, num_experts: int, rows: int) -> int:
    """The most tiles that so many rows can have."""
    return ceil_div(num_rows, rows) + num_experts


@jit
def find_tile(
    ends,
    tile,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    before=None,
    HAS_BEFORE: tl.constexpr = False,
):
    """A tile's expert (E if there is none), its first row, and the end of the expert's rows.

    `ends` are the ends of E experts' rows; with HAS_BEFORE, others' end at `before`.
    """
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < E, other=0)
    start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < E), other=0)
    if HAS_BEFORE:
        start = tl.where(expert == 0, tl.load(before), start)
    tiles = tl.where(expert < E, (end - start + ROWS - 1) // ROWS, 0)
    upto = tl.cumsum(tiles)
    found = tl.sum((upto <= tile).to(tl.int32))
    here = expert == found
    first = tl.sum(tl.where(here, start + (tile - upto + tiles) * ROWS, 0))
    return tl.minimum(found, E), first, tl.sum(tl.where(here, end, 0))
