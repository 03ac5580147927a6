"""The choice of experts by kernels, on a GPU or interpreted, beside torch and autograd."""

import pytest
import torch
from expert_references import reference_choice_backward
from interpreter import DEVICE, draw, with_kernels
from tolerance import assert_close

from kimi_linear.ops.experts.choice import _Choice, choose_experts
from kimi_linear.ops.experts.choice_kernels import launch_choice, launch_choice_backward

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]


def in_torch(logits, bias, num_chosen, renormalize, factor):
    """On the CPU, where there are no kernels, the best first."""
    weights, experts = choose_experts(
        logits.cpu(), bias.cpu(), num_chosen, renormalize=renormalize, factor=factor
    )
    order = (logits.cpu().sigmoid() + bias.cpu()).gather(1, experts).argsort(descending=True)
    return (each.gather(1, order).to(logits.device) for each in (weights, experts))


@with_kernels
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(12, 3), (8, 8), (256, 8), (5, 1)])
def test_choose_experts(num_experts, num_chosen, renormalize):
    logits, bias = draw(21, num_experts), draw(num_experts)
    renormalize = renormalize and num_chosen > 1
    args = (logits, bias, num_chosen, renormalize, 2.5)
    weights, experts = launch_choice(*args)
    expected_weights, expected = in_torch(*args)
    assert torch.equal(experts, expected)
    assert_close(weights, expected_weights, torch.float32)


@with_kernels
def test_choose_experts_stays_in_range_where_logits_are_not_numbers():
    logits = draw(3, 12)
    logits[1] = float("nan")
    experts = launch_choice(logits, draw(12), 3, True, 1.0)[1]
    assert bool(((experts >= 0) & (experts < 12)).all())


@with_kernels
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_experts, num_chosen", [(5, 3), (64, 8), (256, 8), (3, 1)])
def test_gradients_of_the_choice(num_experts, num_chosen, renormalize):
    """What the kernels choose and its gradient, beside autograd's in float64."""
    logits = draw(19, num_experts).requires_grad_()
    bias, grad = draw(num_experts), draw(19, num_chosen)
    renormalize = renormalize and num_chosen > 1
    weights, experts = _Choice.apply(logits, bias, num_chosen, renormalize, 2.5)
    weights.backward(grad)
    exact = logits.detach().double().requires_grad_()
    wanted, chosen = in_torch(exact, bias, num_chosen, renormalize, 2.5)
    assert experts.sort().values.equal(chosen.sort().values)
    order, wanted_order = experts.argsort(), chosen.argsort()
    assert_close(weights.gather(1, order), wanted.gather(1, wanted_order).float(), torch.float32)
    place = torch.empty_like(grad).scatter(1, wanted_order, grad.gather(1, order))
    wanted.backward(place.double())
    assert_close(logits.grad, exact.grad.float(), torch.float32)
    reference = reference_choice_backward(logits.detach(), experts, grad, renormalize, 2.5)
    assert_close(logits.grad, reference, torch.float32)


@with_kernels
def test_no_tokens_choose_nothing():
    logits, experts = draw(0, 5), torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    assert launch_choice_backward(logits, experts, draw(0, 2), True, 1.0).shape == (0, 5)
