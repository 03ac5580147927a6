"""The kernels of the experts in training beside their references: on a GPU, or interpreted."""

import pytest
import torch
from interpreter import DEVICE, DTYPES, draw, with_kernels
from kimi_linear.training_kernels import (
    launch_sum_of_rows,
    launch_weighted_silu_backward,
    reference_sum_of_rows,
    reference_weighted_silu_backward,
)
from tolerance import assert_close


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 1024, 1030])
def test_weighted_silu_backward(size, dtype):
    args = draw(5, 2 * size, dtype=dtype), draw(5), draw(5, size, dtype=dtype)
    actual, expected = launch_weighted_silu_backward(*args), reference_weighted_silu_backward(*args)
    for name, each, wanted in zip(("gate_up", "weights", "inner"), actual, expected, strict=True):
        assert each.dtype == wanted.dtype
        assert_close(each, wanted, torch.float32 if name == "weights" else dtype, name)


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_weighted", [True, False])
def test_sum_of_rows(is_weighted, dtype):
    rows, weights = draw(33, 20, dtype=dtype), draw(11, 3) if is_weighted else None
    places = torch.randperm(33, device=DEVICE).view(11, 3)
    expected = reference_sum_of_rows(rows, places, weights)
    assert_close(launch_sum_of_rows(rows, places, weights), expected, dtype)
