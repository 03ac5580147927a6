"""The gated SiLU's kernels beside torch, on a GPU or interpreted, and torch's beside autograd."""

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE, DTYPES, draw, with_kernels
from tolerance import assert_close

from kimi_linear.ops.gated_silu import (
    launch_gated_silu,
    launch_gated_silu_backward,
    reference_gated_silu_backward,
)

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 1024, 1030])
def test_gated_silu(size, dtype):
    both = draw(5, 2 * size, dtype=dtype)
    for gate, up in (
        both.chunk(2, dim=1),
        (draw(3, size, dtype=dtype), draw(3, size, dtype=dtype)),
    ):
        assert_close(
            launch_gated_silu(gate, up), (F.silu(gate.float()) * up.float()).to(dtype), dtype
        )


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 24, 1024, 1030])
def test_gated_silu_backward(size, dtype):
    order = torch.tensor([3, 0, 5, 4, 1, 2], device=DEVICE)
    args = draw(6, 2 * size, dtype=dtype), draw(6, size, dtype=dtype), draw(3, 2), order
    actual, expected = launch_gated_silu_backward(*args), reference_gated_silu_backward(*args)
    for name, each, wanted in zip(("gate_up", "weights", "inner"), actual, expected, strict=True):
        assert each.dtype == wanted.dtype
        assert_close(each, wanted, torch.float32 if name == "weights" else dtype, name)


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_silu_backward_without_weights(dtype):
    gate_up, grad = draw(5, 48, dtype=dtype), draw(5, 24, dtype=dtype)
    actual = launch_gated_silu_backward(gate_up, grad)
    ones, order = torch.ones(5, device=DEVICE), torch.arange(5, device=DEVICE)
    expected = reference_gated_silu_backward(gate_up, grad, ones, order)
    assert actual[1] is None
    assert_close(actual[0], expected[0], dtype)
    assert_close(actual[2], expected[2], dtype)


def test_backward_of_the_weighted_gated_silu():
    gate_up, weights = torch.randn(5, 14).double(), torch.randn(5).double()
    gate_up.requires_grad_(), weights.requires_grad_()
    grad = torch.randn(5, 7).double()
    gate, up = gate_up.chunk(2, dim=1)
    product = weights[:, None] * F.silu(gate) * up
    expected = torch.autograd.grad(product, (gate_up, weights), grad)
    order = torch.tensor([2, 0, 4, 1, 3])
    stored = torch.empty(5, dtype=torch.float64).scatter(0, order, weights.detach())
    gate_up_grad, stored_grad, inner = reference_gated_silu_backward(
        gate_up.detach(), grad, stored, order
    )
    actual = gate_up_grad, stored_grad[order], inner
    names = ("gate_up", "weights", "product")
    for name, each, wanted in zip(names, actual, (*expected, product), strict=True):
        assert_close(each, wanted, torch.float64, name)
