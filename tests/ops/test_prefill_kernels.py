"""Prefill's kernels beside their references: on a GPU, or by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from expert_references import reference_down, reference_gate_up, reference_weighted_sum
from interpreter import DEVICE, DTYPES, IS_INTERPRETED, draw, triton, with_kernels
from tolerance import assert_close

from kimi_linear.ops.experts import prefill_kernels
from kimi_linear.ops.experts.row_sums import launch_sum_of_rows, reference_sum_of_rows, weighted_sum
from kimi_linear.ops.experts.sort import (
    SortedPairs,
    launch_sort_pairs,
    reference_sort_pairs,
    sort_pairs,
)
from kimi_linear.ops.short_conv.convolution import short_convolution
from kimi_linear.ops.short_conv.prefill_kernels import convolve_three

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]


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
@pytest.mark.parametrize("dtype", [torch.float32] if IS_INTERPRETED else DTYPES[1:])
@pytest.mark.parametrize(("tokens", "hidden", "width"), [(1, 64, 40), (50, 40, 64), (90, 72, 136)])
def test_products_by_expert(monkeypatch, tokens, hidden, width, dtype):
    if IS_INTERPRETED:
        monkeypatch.setattr(prefill_kernels, "GATE_UP_TILE", (16, 32, 16))
        monkeypatch.setattr(prefill_kernels, "DOWN_TILE", (16, 32, 16))
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
    outputs, after = convolve_three(inputs, weights, state)
    for i, (x, weight) in enumerate(zip(inputs, weights, strict=True)):
        initial = None if state is None else state[:, i]
        out, last = short_convolution(
            x, weight, initial_state=initial, output_final_state=True, backend="torch"
        )
        assert_close(outputs[i], out, dtype)
        assert torch.equal(after[:, i], last)


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_weighted", [True, False])
def test_sum_of_rows(is_weighted, dtype):
    rows, weights = draw(33, 20, dtype=dtype), draw(11, 3) if is_weighted else None
    places = torch.randperm(33, device=DEVICE).view(11, 3)
    expected = reference_sum_of_rows(rows, places, weights)
    assert_close(launch_sum_of_rows(rows, places, weights), expected, dtype)
