"""Rows of tokens for training: held-out rows, packing, batches.

Shapes: B rows of a batch, T tokens of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def hold_out(rows: Any, percent: float | None, seed: int, what: str = "row") -> tuple[Any, Any]:
    """Rows to train on and rows to evaluate on, the latter None if `percent` is 0 or None.

    Args:
        rows: A dataset of known length.
        percent: Rows to hold out, of a hundred; at least one is.
        seed: Of the choice.
        what: What messages call a row.

    Raises:
        ValueError: If there are fewer than two rows, or `percent` is not below 100.
    """
    if not percent:
        return rows, None
    if not 0 < percent < 100 or len(rows) < 2:
        raise ValueError(
            f"eval_percent={percent} of {len(rows)} {what}s is not allowed: above 0, below 100, "
            f"and at least one {what} for training and one held out"
        )
    count = min(max(1, round(len(rows) * percent / 100)), len(rows) - 1)
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def pack(
    sequences: Iterable[Sequence[int]], length: int, *, keep_rest: bool = False
) -> Iterator[dict[str, list[int]]]:
    """Lay token sequences end to end and cut the result into rows.

    Args:
        sequences: Token ids, each sequence with its own begin and end token.
        length: T.
        keep_rest: Whether to yield a last row that is shorter.

    Yields:
        `input_ids` [T] and `position_ids` [T], which restart with every sequence, so that none sees
        another.

    Raises:
        ValueError: If `length` is below 2.
    """
    if length < 2:
        raise ValueError(f"length={length} is not allowed: a row needs at least 2 tokens")
    ids: list[int] = []
    positions: list[int] = []
    for sequence in sequences:
        ids.extend(sequence)
        positions.extend(range(len(sequence)))
        start = 0
        while len(ids) - start >= length:
            yield {"input_ids": ids[start : start + length], **_row(positions, start, length)}
            start += length
        del ids[:start], positions[:start]
    if keep_rest and len(ids) >= 2:
        yield {"input_ids": ids, **_row(positions, 0, len(ids))}


def _row(positions: list[int], start: int, length: int) -> dict[str, list[int]]:
    """Positions of one row; a sequence that goes on from the row before counts from 0 again."""
    row = positions[start : start + length]
    restart = next((i for i in range(1, length) if row[i] == 0), length)
    return {"position_ids": [*range(restart), *row[restart:]]}


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """A batch of rows of equal length.

    Args:
        rows: `input_ids` [T] and `position_ids` [T] of each.

    Returns:
        Both and `labels`, each [B, T] int64; the model shifts the labels.
    """
    batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "position_ids")}
    return {**batch, "labels": batch["input_ids"].clone()}
