"""`sequence_layout`: padding and packing in every notation give the same boundaries."""

import pytest
import torch

from kimi_linear.inputs.layout import sequence_layout


def layout_of(batch_size, num_tokens, **kwargs):
    return sequence_layout(batch_size, num_tokens, device=torch.device("cpu"), **kwargs)


def test_plain_rows_need_no_layout():
    for kwargs in (
        {},
        {"attention_mask": torch.ones(2, 5)},
        {"position_ids": torch.arange(5)[None]},
        {"seq_idx": torch.zeros(1, 5, dtype=torch.int32)},
    ):
        layout = layout_of(2, 5, **kwargs)
        assert layout.cu_seqlens is None and layout.token_index is None and not layout.is_packed


@pytest.mark.parametrize(
    "notation",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2]])},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 2, 2, 2]], dtype=torch.int32)},
        {"cu_seq_lens": torch.tensor([0, 3, 4, 7], dtype=torch.int32)},
        {
            "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2]]),
            "cu_seq_lens": torch.tensor([0, 3, 4, 7]),
        },
        {"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2]]), "attention_mask": torch.ones(1, 7)},
        {"position_ids": torch.tensor([[5, 6, 9, 2, 1, 4, 8]])},
    ],
)
def test_packing_notations_agree(notation):
    layout = layout_of(1, 7, **notation)
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 7]
    assert layout.sequence_ids.tolist() == [[0, 0, 0, 1, 2, 2, 2]]
    assert (layout.row_first.tolist(), layout.row_last.tolist()) == ([0], [2])
    assert layout.token_index is None


def test_cu_seq_lens_with_an_empty_sequence():
    assert layout_of(1, 5, cu_seq_lens=torch.tensor([0, 2, 2, 5])).cu_seqlens.tolist() == [0, 2, 5]


def test_padding_anywhere_is_skipped():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]])
    layout = layout_of(3, 5, attention_mask=mask)
    assert layout.token_index.tolist() == [2, 3, 4, 5, 7, 9]
    assert layout.cu_seqlens.tolist() == [0, 3, 6, 6]
    assert not layout.is_packed


def test_positions_made_from_a_mask_are_no_packing():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    assert not layout_of(2, 5, attention_mask=mask, position_ids=positions).is_packed
    assert not layout_of(2, 5, attention_mask=mask, position_ids=torch.arange(5)[None]).is_packed


def test_packed_rows_with_padding():
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 0, 1]])
    layout = layout_of(2, 6, attention_mask=mask, position_ids=positions)
    assert layout.cu_seqlens.tolist() == [0, 2, 5, 8, 10]
    assert (layout.row_first.tolist(), layout.row_last.tolist()) == ([0, 2], [1, 3])


def test_a_boundary_on_padding_begins_the_next_real_token():
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    for boundary in (
        {"cu_seq_lens": torch.tensor([0, 2, 5])},
        {"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])},
    ):
        layout = layout_of(1, 5, attention_mask=mask, **boundary)
        assert layout.cu_seqlens.tolist() == [0, 2, 4]


def test_only_the_last_columns_of_the_mask_count():
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    assert layout_of(1, 2, attention_mask=mask).cu_seqlens is None


def test_pack_and_unpack_are_inverse_on_real_tokens():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    layout = layout_of(2, 4, attention_mask=mask)
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(layout.unpack(layout.pack(x), 2), x * mask[..., None])


def test_a_layout_moves_to_another_device_as_one():
    """accelerate calls `to` where layers are on several devices."""
    moved = layout_of(1, 4, position_ids=torch.tensor([[0, 1, 0, 1]])).to(torch.device("meta"))
    for tensor in (moved.cu_seqlens, moved.row_first, moved.row_last, moved.sequence_ids):
        assert tensor.device.type == "meta"
    assert moved.num_places == 4 and moved.token_index is None


def test_states_go_to_the_first_and_come_from_the_last_sequence_of_each_row():
    layout = layout_of(2, 3, position_ids=torch.tensor([[0, 1, 0], [0, 1, 2]]))
    rows = torch.tensor([[1.0], [2.0]])
    assert layout.initial_states(rows).tolist() == [[1.0], [0.0], [2.0]]
    assert layout.row_states(torch.tensor([[1.0], [5.0], [2.0]])).tolist() == [[5.0], [2.0]]


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "attention_mask"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask"),
        ({"attention_mask": torch.ones(3, 5)}, "attention_mask"),
        ({"position_ids": torch.zeros(2, 4)}, "position_ids"),
        ({"seq_idx": torch.zeros(5)}, "seq_idx"),
        ({"cu_seq_lens": torch.tensor([0, 5])}, "cu_seq_lens_q"),
        ({"cu_seq_lens": torch.tensor([0, 7, 3, 10])}, "cu_seq_lens_q"),
        ({"cu_seq_lens": torch.tensor([1, 10])}, "cu_seq_lens_q"),
        ({"cu_seq_lens": [0, 5, 10]}, "cu_seq_lens_q=list"),
        ({"cu_seq_lens": torch.tensor([0.0, 5.5, 10.0])}, "cu_seq_lens_q is torch.float32"),
        ({"cu_seq_lens": torch.arange(10**5)}, r"cu_seq_lens_q=\[0, 1, 2, 3, 4, 5, \.\.\.\] is"),
        ({"seq_idx": [[0] * 5]}, "seq_idx=list"),
        ({"position_ids": [[0] * 5]}, "position_ids=list"),
    ],
)
def test_wrong_shapes_are_refused_by_name(kwargs, named):
    with pytest.raises(ValueError, match=named):
        layout_of(2, 5, **kwargs)


def test_a_layout_moves_after_its_numbers_were_read():
    """What was worked out once and kept is no field."""
    layout = sequence_layout(1, 5, seq_idx=torch.tensor([[0, 0, 1, 1, 1]]))
    assert layout.token_starts.tolist() == [0, 0, 2, 2, 2] and layout.ends == [0, 2, 5]
    assert layout.to(torch.device("cpu")).ends == [0, 2, 5]
