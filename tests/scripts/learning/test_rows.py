"""Packing of sequences into rows."""

import itertools

import pytest
import torch
from builders import tiny_model
from learning.rows import collate, pack


@pytest.mark.parametrize("length", [2, 3, 5, 64])
def test_packing_loses_nothing_but_the_rest(length: int) -> None:
    sequences = [list(range(10, 10 + n)) for n in (1, 4, 9, 2, 17)]
    flat = list(itertools.chain(*sequences))
    rows = list(pack(sequences, length, keep_rest=True))
    packed = list(itertools.chain(*(row["input_ids"] for row in rows)))
    assert packed == flat[: len(packed)]
    assert len(flat) - len(packed) <= 1  # a single token predicts nothing
    starts = set(itertools.accumulate((len(s) for s in sequences), initial=0))
    at = 0
    for row in rows:
        for i, position in enumerate(row["position_ids"]):
            begins = i == 0 or at + i in starts
            assert (position == 0) == begins
            assert begins or position == row["position_ids"][i - 1] + 1
        at += len(row["input_ids"])
    assert all(len(row["input_ids"]) == length for row in pack(sequences, length))


def test_packed_sequences_do_not_see_each_other_in_training() -> None:
    model = tiny_model().train()
    first, second = [5, 6, 7, 8], [9, 10, 11, 12]
    [row] = pack([first, second], 8)
    batch = collate([row])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    alone = model(input_ids=torch.tensor([second])).logits
    torch.testing.assert_close(packed[:, 4:], alone, atol=1e-5, rtol=1e-5)


def test_packing_refuses_rows_of_one_token() -> None:
    with pytest.raises(ValueError, match="length=1"):
        list(pack([[1, 2]], 1))
