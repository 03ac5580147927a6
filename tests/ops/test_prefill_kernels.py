"""Prefill's kernels beside their references: on a GPU, or by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expert_references import reference_down, reference_gate_up, reference_weighted_sum
from interpreter import DEVICE, DTYPES, IS_INTERPRETED, draw, triton, with_kernels
from packed_weights import SCHEMES, random_packed
from tolerance import assert_close

from kimi_linear.ops.experts import packed, packed_kernels, prefill_kernels
from kimi_linear.ops.experts.row_sums import launch_sum_of_rows, reference_sum_of_rows, weighted_sum
from kimi_linear.ops.experts.sort import (
    SortedPairs,
    launch_sort_pairs,
    reference_sort_pairs,
    sort_pairs,
)
from kimi_linear.ops.kda.recurrent import l2norm
from kimi_linear.ops.short_conv.convolution import short_convolution
from kimi_linear.ops.short_conv.prefill_kernels import convolve_three
from kimi_linear.schemes import Scheme

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]
# on a GPU, the last ones have experts with more rows than half a tile, and than a tile
SIZES = [(1, 64, 40), (50, 40, 64), (90, 72, 136), (230, 72, 136)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Under the interpreter, which runs program by program: of the products of plain experts."""
    if IS_INTERPRETED:
        monkeypatch.setattr(prefill_kernels, "GATE_UP_TILE", (16, 32, 16))
        monkeypatch.setattr(prefill_kernels, "DOWN_TILE", (16, 32, 16))


@pytest.mark.skipif(triton is None, reason="needs triton")
@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter does not compile")
def test_all_compile_for_hopper(tmp_path):
    command = [sys.executable, str(Path(__file__).parents[1] / "support" / "compile_kernels.py")]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_sum_leaves_out_experts_of_other_ranks(dtype):
    weights, experts = draw(11, 3), torch.randint(0, 6, (11, 3), device=DEVICE)
    pairs = draw(33, 20, dtype=dtype)
    pairs[experts.flatten() >= 5] = float("nan")  # what the products leave there
    args = (pairs, weights, experts, 5)
    assert_close(weighted_sum(*args), reference_weighted_sum(*args), dtype)


@with_kernels
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32] if IS_INTERPRETED else DTYPES[1:])
@pytest.mark.parametrize(("tokens", "hidden", "width"), SIZES)
def test_products_by_expert(tokens, hidden, width, dtype):
    x = draw(tokens, hidden, dtype=dtype)
    up_weight = draw(6, 2 * width, hidden, dtype=dtype) * hidden**-0.5
    down_weight = draw(6, hidden, width, dtype=dtype) * width**-0.5
    experts = torch.rand(tokens, 8, device=DEVICE).topk(3, dim=-1).indices  # 6 and 7: other ranks'
    experts[experts == 2] = 4
    order, ends, *_ = sort_pairs(experts, 6)
    real = int(ends[-1])
    inner = prefill_kernels.gate_up(x, order, ends, up_weight, 3)
    expected_inner = reference_gate_up(x, order, ends, up_weight, 3)
    assert_close(inner[:real], expected_inner[:real], dtype)
    pairs = prefill_kernels.down(expected_inner, order, ends, down_weight)
    expected = reference_down(expected_inner, order, ends, down_weight)
    written = (experts < 6).flatten()
    assert_close(pairs[written], expected[written], dtype)


@with_kernels
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32] if IS_INTERPRETED else DTYPES[1:])
def test_last_rows_that_half_a_tile_holds(dtype):
    """And one more, and those of a whole tile."""
    rows = prefill_kernels.GATE_UP_TILE[0]
    counts = [rows // 2, rows // 2 + 1, 0, rows, rows + 1]
    experts = torch.arange(5).repeat_interleave(torch.tensor(counts))[:, None].to(DEVICE)
    experts = experts[torch.randperm(len(experts)).to(DEVICE)]
    x, up, down = (draw(*s, dtype=dtype) for s in ((len(experts), 40), (5, 64, 40), (5, 40, 32)))
    order, ends, *_ = sort_pairs(experts, 5)
    expected = reference_gate_up(x, order, ends, up, 1)
    assert_close(prefill_kernels.gate_up(x, order, ends, up, 1), expected, dtype)
    pairs = prefill_kernels.down(expected, order, ends, down)
    assert_close(pairs, reference_down(expected, order, ends, down), dtype)


@with_kernels
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32] if IS_INTERPRETED else DTYPES[1:])
def test_products_of_some_experts_at_a_time(dtype):
    x, up, down = (draw(*s, dtype=dtype) for s in ((50, 40), (6, 128, 40), (6, 40, 64)))
    experts = torch.rand(50, 8, device=DEVICE).topk(3, dim=-1).indices
    order, ends, *_ = sort_pairs(experts, 6)
    inner = x.new_zeros(150, 64)
    pairs = x.new_zeros(150, 40)
    for some in (slice(0, 4), slice(4, 6)):
        prefill_kernels.gate_up(x, order, ends, up[some], 3, some.start, inner)
        prefill_kernels.down(inner, order, ends, down[some], some.start, pairs)
    whole = prefill_kernels.gate_up(x, order, ends, up, 3)
    real, written = int(ends[-1]), (experts < 6).flatten()
    assert torch.equal(inner[:real], whole[:real])
    expected = prefill_kernels.down(whole, order, ends, down)
    assert torch.equal(pairs[written], expected[written])


PACKED = {
    name: scheme for name, scheme in SCHEMES.items() if name in ("3 bits", "8 bits a row")
} | {"4 bits, zeros": Scheme(4, 32, is_symmetric=False)}


@with_kernels
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32] if IS_INTERPRETED else DTYPES[1:])
@pytest.mark.parametrize("scheme", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("is_written_out", [False, True])
def test_products_by_packed_experts(monkeypatch, is_written_out, scheme, dtype):
    if IS_INTERPRETED:
        monkeypatch.setattr(packed_kernels, "TILE", (32, 32, 4, 2))
    if is_written_out:
        monkeypatch.setattr(packed, "MANY_ROWS", 0)
        monkeypatch.setattr(packed, "UNPACKED_BYTES", 1 << 15)
        monkeypatch.setattr(packed, "_has_tiles", lambda x: True)
    factor = 0.25 / (1 << scheme.bits)  # weights as large as a model's
    first, up = random_packed(scheme, (6, 128, 64), dtype, DEVICE, factor)
    second, down = random_packed(scheme, (6, 64, 64), dtype, DEVICE, factor)
    x = draw(90, 64, dtype=dtype)
    experts = torch.rand(90, 8, device=DEVICE).topk(3, dim=-1).indices  # 6 and 7: other ranks'
    experts[experts == 2] = 4
    order, ends, *_ = sorted_pairs = sort_pairs(experts, 6)
    pairs = packed.packed_products(x, sorted_pairs, (first, second))
    written = (experts < 6).flatten()
    inner = reference_gate_up(x, order, ends, up, 3)
    expected = reference_down(inner, order, ends, down)[written]
    assert_close(pairs[written] / expected.std(), expected / expected.std(), dtype)


@with_kernels
@pytest.mark.parametrize("tokens", [0, 1, 31, 300])
@pytest.mark.parametrize("num_experts", [1, 6, 63, 64, 256])
def test_sort_pairs(num_experts, tokens):
    """Those of other ranks' experts last; several programs, and experts that nobody chose."""
    experts = torch.randint(0, num_experts + 2, (tokens, 3), device=DEVICE)
    experts[experts == 2] = 4
    actual = launch_sort_pairs(experts, num_experts)
    for name, mine, wanted in zip(
        SortedPairs._fields, actual, reference_sort_pairs(experts, num_experts), strict=True
    ):
        assert mine.dtype == wanted.dtype and torch.equal(mine, wanted), name


def normed(x, head_dim):
    heads = x.unflatten(-1, (-1, head_dim))
    return l2norm(heads).flatten(-2)


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_state", [True, False])
@pytest.mark.parametrize(
    ("rows", "tokens", "channels", "width"),
    [
        (2, 50, 130, 4),
        (1, 1, 40, 4),
        (2, 2, 10, 4),
        (1, 33, 20, 3),
        (1, 70, 24, 4),
    ],
)
def test_three_convolutions_in_one(rows, tokens, channels, width, has_state, dtype):
    inputs = [draw(rows, tokens, channels, dtype=dtype) for _ in range(3)]
    weights = [draw(channels, 1, width, dtype=dtype) for _ in range(3)]
    state = draw(rows, 3, channels, width - 1, dtype=dtype) if has_state else None
    outputs, after = convolve_three(inputs, weights, state, channels // 2)
    for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        initial = None if state is None else state[:, i]
        out, last = short_convolution(
            x, weight, initial_state=initial, output_final_state=True, backend="torch"
        )
        assert_close(outputs[i], normed(out, channels // 2) if i < 2 else out, dtype)
        assert torch.equal(after[:, i], last)


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("lengths", [[5], [0, 3, 0, 0, 40, 1, 2, 31, 0], [33, 0], [0, 64, 7]])
def test_three_convolutions_of_packed_sequences(lengths, has_state, dtype):
    """Some are empty, some shorter than the state, some begin inside of a block."""
    tokens, ends = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    inputs = [draw(1, tokens, 130, dtype=dtype) for _ in range(3)]
    weights = [draw(130, 1, 4, dtype=dtype) for _ in range(3)]
    state = draw(len(lengths), 3, 130, 3, dtype=dtype) if has_state else None
    outputs, after = convolve_three(inputs, weights, state, 26, ends)
    for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        initial = None if state is None else state[:, i]
        options = {"initial_state": initial, "output_final_state": True, "cu_seqlens": ends}
        out, last = short_convolution(x, weight, **options, backend="torch")
        assert_close(outputs[i], normed(out, 26) if i < 2 else out, dtype)
        assert torch.equal(after[:, i], last)


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_weighted", [True, False])
def test_sum_of_rows(is_weighted, dtype):
    rows, weights = draw(33, 20, dtype=dtype), draw(11, 3) if is_weighted else None
    places = torch.randperm(33, device=DEVICE).view(11, 3)
    expected = reference_sum_of_rows(rows, places, weights)
    assert_close(launch_sum_of_rows(rows, places, weights), expected, dtype)
