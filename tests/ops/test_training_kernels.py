"""The kernels of the experts in training beside their references: on a GPU, or interpreted."""

import pytest
import torch
from interpreter import DEVICE, DTYPES, draw, with_kernels
from kimi_linear.ops.experts.prefill_kernels import reference_choose_experts
from kimi_linear.ops.experts.training_kernels import (
    choose_experts_in_training,
    launch_choice_backward,
    launch_sum_of_rows,
    reference_choice_backward,
    reference_sum_of_rows,
)
from tolerance import assert_close

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]


@with_kernels
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_experts, num_chosen", [(5, 3), (64, 8), (256, 8), (3, 1)])
def test_choice_of_experts(num_experts, num_chosen, renormalize):
    """What the kernels choose and its gradient, beside autograd's in float64."""
    logits = draw(19, num_experts).requires_grad_()
    bias, grad = draw(num_experts), draw(19, num_chosen)
    weights, experts = choose_experts_in_training(logits, bias, num_chosen, renormalize, 2.5)
    weights.backward(grad)
    exact = logits.detach().double().requires_grad_()
    wanted, chosen = reference_choose_experts(exact, bias, num_chosen, renormalize, 2.5)
    assert experts.sort().values.equal(chosen.sort().values)
    order, wanted_order = experts.argsort(), chosen.argsort()
    assert_close(weights.gather(1, order), wanted.gather(1, wanted_order).float(), torch.float32)
    place = torch.empty_like(grad).scatter(1, wanted_order, grad.gather(1, order))
    wanted.backward(place.double())
    assert_close(logits.grad, exact.grad.float(), torch.float32)
    reference = reference_choice_backward(
        logits.detach(), experts, grad, renormalize and num_chosen > 1, 2.5
    )
    assert_close(logits.grad, reference, torch.float32)


@with_kernels
def test_no_tokens_choose_nothing():
    logits, experts = draw(0, 5), torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    assert launch_choice_backward(logits, experts, draw(0, 2), True, 1.0).shape == (0, 5)


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_weighted", [True, False])
def test_sum_of_rows(is_weighted, dtype):
    rows, weights = draw(33, 20, dtype=dtype), draw(11, 3) if is_weighted else None
    places = torch.randperm(33, device=DEVICE).view(11, 3)
    expected = reference_sum_of_rows(rows, places, weights)
    assert_close(launch_sum_of_rows(rows, places, weights), expected, dtype)
