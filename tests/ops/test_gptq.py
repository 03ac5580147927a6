"""Weights brought to few bits by what their inputs are."""

import pytest
import torch
from one_thread import one_thread  # noqa: F401

from kimi_linear.ops.packed.gptq import drawn_to_shared, gptq, second_moment
from kimi_linear.ops.packed.rounding import quantize
from kimi_linear.schemes import Scheme

K, N = 192, 40
# Most of the error that is left of that of rounding without data.
SCHEMES = {
    Scheme(3, 64): 0.5,
    Scheme(3, 32, is_symmetric=False): 0.5,
    Scheme(4, 32): 0.5,
    Scheme(4, 64, is_symmetric=False): 0.5,
    Scheme(4, 192): 0.5,
    Scheme(8, 64): 0.5,
    Scheme(8, None): 0.5,
    Scheme(8, 64, is_float=True, rows=16): 0.5,
    Scheme(8, 128, is_float=True, rows=16): 0.5,  # cut short on both sides
}


def inputs(num_tokens, seed=0, own=0.0):
    """Of a power law in directions of their own, some channels large; `own` of the variance is of
    directions that others have not."""
    shared, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    spread = torch.arange(1, K + 1) ** -0.6
    channels = torch.exp(0.5 * torch.randn(K, generator=shared))
    shape = (num_tokens, K)

    def along(directions, share):
        rotation = torch.linalg.qr(torch.randn(K, K, generator=directions))[0]
        return torch.randn(*shape, generator=other) * share**0.5 * spread @ rotation

    return (along(shared, 1 - own) + along(other, own)) * channels


def error(packed, weights, hessian):
    """Of the outputs, squared and summed."""
    difference = (packed.dequantized() - weights).double()
    return torch.einsum("nk,kl,nl->", difference, hessian.double(), difference).item()


@pytest.fixture(scope="module")
def hessian():
    return second_moment(inputs(4096)) / 4096


@pytest.mark.parametrize(("scheme", "part"), SCHEMES.items(), ids=str)
def test_outputs_change_less_than_without_data(scheme, part, hessian):
    weights = torch.randn(N, K) * 0.02
    seen = second_moment(inputs(4096, seed=1))  # other tokens of the same kind
    packed, plain = gptq(weights, seen, scheme), quantize(weights, scheme)
    assert (packed.scheme, packed.dtype, packed.shape) == (scheme, plain.dtype, plain.shape)
    assert error(packed, weights, hessian) < part * error(plain, weights, hessian)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("factor", [0.0, 1e-30, 1.0, 1e6])
def test_inputs_without_correlation_give_the_result_without_data(scheme, factor):
    weights = torch.randn(N, K, dtype=torch.bfloat16)
    packed = gptq(weights, torch.eye(K) * factor, scheme)
    assert torch.equal(packed.dequantized(), quantize(weights, scheme).dequantized())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_matrices_are_worked_on_together_as_alone(scheme):
    weights = torch.randn(3, N, K, dtype=torch.bfloat16)
    hessians = torch.stack([second_moment(inputs(300, seed)) for seed in range(3)])
    together = gptq(weights, hessians, scheme, rows=16)
    for i in range(3):
        alone = gptq(weights[i], hessians[i], scheme)
        least = min(error(x, weights[i].float(), hessians[i]) for x in (together[i], alone))
        assert error(together[i], weights[i].float(), hessians[i]) < 1.02 * least
        is_same = together[i].dequantized() == alone.dequantized()
        assert is_same.float().mean() > 0.98  # sums differ in their last bits


@pytest.mark.parametrize("num_tokens", [0, 1, 64, 4096])
@pytest.mark.parametrize("own", [0.2, 0.5])
def test_experts_are_better_off_than_with_either_hessian_alone(num_tokens, own):
    scheme, weights = Scheme(3, 64), torch.randn(N, K) * 0.02
    layer = torch.cat([inputs(1024, seed, own) for seed in range(2, 10)])
    shared = second_moment(layer) / len(layer)
    tokens = inputs(4096 + num_tokens, 1, own)
    true = second_moment(tokens[num_tokens:]) / 4096
    sums = second_moment(tokens[:num_tokens])
    drawn = drawn_to_shared(sums, num_tokens, shared)
    if num_tokens == 0:
        assert torch.allclose(drawn, shared)
    found = error(gptq(weights, drawn, scheme), weights, true)
    alone = error(gptq(weights, sums, scheme), weights, true)
    without = error(gptq(weights, shared, scheme), weights, true)
    assert found < 1.02 * min(alone, without)
    assert found < error(quantize(weights, scheme), weights, true)


def test_experts_with_all_numbers_of_tokens_at_once():
    shared = second_moment(inputs(512)) / 512
    sums = torch.stack([torch.zeros(K, K), second_moment(inputs(1)), second_moment(inputs(5000))])
    drawn = drawn_to_shared(sums, torch.tensor([0, 1, 5000]), shared)
    assert torch.allclose(drawn[0], shared)
    assert torch.allclose(drawn[2], sums[2] / 5000, rtol=0.1, atol=0.05 * shared.abs().max())
    packed = gptq(torch.randn(3, N, K), drawn, Scheme(4, 64))
    assert packed.dequantized().isfinite().all()


def test_inputs_that_are_always_zero_or_equal_do_no_harm():
    seen = inputs(500)
    seen[:, 7] = 0
    seen[:, 11] = seen[:, 12]
    weights = torch.randn(N, K)
    packed = gptq(weights, second_moment(seen), Scheme(4, 64))
    assert (packed.dequantized() - weights)[:, 7].abs().max() < 0.5
    assert packed.dequantized().isfinite().all()


def test_what_cannot_be_used_is_refused():
    weights, hessian = torch.randn(4, K), torch.eye(K)
    with pytest.raises(ValueError, match="w: group=128 is not allowed"):
        gptq(weights, hessian, Scheme(4, 128), "w")
    with pytest.raises(ValueError, match=r"the Hessian of w is \[64, 64\]; allowed: \[.., 192,"):
        gptq(weights, torch.eye(64), Scheme(4, 64), "w")
    with pytest.raises(ValueError, match="the Hessian of w has numbers that are not finite"):
        gptq(weights, hessian * float("nan"), Scheme(4, 64), "w")
    with pytest.raises(ValueError, match="w has numbers that are not finite"):
        gptq(weights / 0, hessian, Scheme(4, 64), "w")
