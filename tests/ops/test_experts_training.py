"""Experts in training beside the layer that takes one expert at a time."""

import pytest
import torch
from builders import tiny_config, tiny_model, token_ids
from tolerance import TOLERANCE, assert_close

from kimi_linear.layers.moe import KimiLinearExperts
from kimi_linear.ops import experts as experts_kimi_linear
from kimi_linear.ops.experts.training import train_experts, trains_lean

pytestmark = [pytest.mark.core, pytest.mark.kernels]

NAMES = ("out", "x", "weights", "gate_up_proj", "down_proj")


def make_experts(dtype, **fields):
    torch.manual_seed(0)
    experts = KimiLinearExperts(tiny_config(**fields))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts.to(dtype)


def draw(num_tokens, dtype, num_experts=6, num_chosen=2):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, 40, generator=generator).to(dtype)
    index = torch.rand(num_tokens, num_experts, generator=generator).topk(num_chosen).indices
    index[index == 3] = 4  # an expert without tokens, and tokens that choose one twice
    weights = torch.rand(num_tokens, num_chosen, generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    return x.requires_grad_(), index, weights.to(wide).requires_grad_()


def run(function, experts, x, index, weights):
    out = function(experts, x, index, weights)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    inputs = x, weights, experts.gate_up_proj, experts.down_proj
    return dict(zip(NAMES, (out, *torch.autograd.grad(out, inputs, seed)), strict=True))


def one_at_a_time(experts, x, index, weights):
    experts.config._experts_implementation = "eager"
    return experts(x, index, weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_tokens", "num_chosen"), [(1, 2), (2, 1), (70, 2), (50, 6)])
def test_values_and_gradients(num_tokens, num_chosen, dtype):
    experts = make_experts(dtype)
    inputs = draw(num_tokens, dtype, num_chosen=num_chosen)
    assert trains_lean(experts, inputs[0], inputs[2])
    expected, actual = (run(f, experts, *inputs) for f in (one_at_a_time, train_experts))
    for name in NAMES:
        assert actual[name].dtype == expected[name].dtype
        assert_close(actual[name], expected[name], dtype, name)


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_are_not_further_off(autocast):
    experts = make_experts(torch.float32 if autocast else torch.bfloat16)
    x, index, weights = draw(70, torch.float32 if autocast else torch.bfloat16)
    exact_experts = make_experts(torch.bfloat16 if not autocast else torch.float32).double()
    exact = run(
        one_at_a_time,
        exact_experts,
        x.detach().double().requires_grad_(),
        index,
        weights.detach().double().requires_grad_(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours, theirs = (run(f, experts, x, index, weights) for f in (train_experts, one_at_a_time))
    for name in NAMES:
        error, allowed = ((each[name].double() - exact[name]).norm() for each in (ours, theirs))
        assert ours[name].dtype == theirs[name].dtype
        assert error <= 1.5 * allowed + TOLERANCE[torch.float32] * exact[name].norm(), name


def test_only_wanted_gradients():
    experts, (x, index, weights) = make_experts(torch.float32), draw(20, torch.float32)
    expected = run(one_at_a_time, experts, x, index, weights)
    experts.requires_grad_(False)
    train_experts(experts, x, index, weights).backward(torch.ones(20, 40))
    assert experts.down_proj.grad is None and x.grad is not None
    experts.requires_grad_(True)
    out = train_experts(experts, x.detach(), index, weights.detach())
    assert_close(out, expected["out"], torch.float32)
    out.sum().backward()
    assert experts.gate_up_proj.grad is not None


def test_model_trains_with_them(monkeypatch):
    calls = []

    def counted(*args):
        calls.append(args)
        return train_experts(*args)

    monkeypatch.setattr(experts_kimi_linear, "train_experts", counted)
    model, ids = tiny_model().train(), token_ids(2, 30)
    grads = {}
    for implementation in ("eager", "grouped_mm"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads[implementation] = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert len(calls) == 3
    for name, grad in grads["eager"].items():
        assert_close(grads["grouped_mm"][name], grad, torch.float32, name)


def test_what_the_backward_pass_keeps():
    experts, (x, index, weights) = make_experts(torch.float32), draw(70, torch.float32)
    kept = {}

    def keep(tensor):
        if tensor.is_floating_point() and not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train_experts(experts, x, index, weights)
    width = experts.down_proj.shape[2]
    assert sum(kept.values()) == x.numel() + weights.numel() + weights.numel() * 2 * width
