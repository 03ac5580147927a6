"""Weights brought to few bits without data."""

import pytest
import torch

from kimi_linear.ops.packed.rounding import quantize
from kimi_linear.schemes import Scheme

# Root mean square of the error, over that of normal weights: the best of scalar codes of so many
# levels (Lloyd and Max) have 0.186 for 8 and 0.098 for 16; evenly spaced ones 0.194 and 0.107.
ERRORS = {
    Scheme(3, 64): 0.205,
    Scheme(3, 64, is_symmetric=False): 0.200,
    Scheme(4, 64): 0.105,
    Scheme(4, 32, is_symmetric=False): 0.085,
    Scheme(8, 128): 0.0075,
    Scheme(8, None): 0.0085,
    Scheme(8, 128, is_float=True, rows=128): 0.030,
}


def plain_rounding(weights, scheme):
    """By the largest number of each group."""
    groups = weights.unflatten(-1, (-1, scheme.group or weights.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True) / (scheme.middle - 1)
    return ((groups / scale).round() * scale).flatten(-2)


@pytest.mark.parametrize(("scheme", "bound"), ERRORS.items(), ids=str)
def test_errors_are_near_the_best_possible(scheme, bound):
    weights = torch.randn(256, 512)
    packed = quantize(weights, scheme)
    error = (packed.dequantized() - weights).square().mean().sqrt().item()
    assert error < bound
    if not scheme.is_float:
        plain = (plain_rounding(weights, scheme) - weights).square().mean().sqrt().item()
        assert error < plain


@pytest.mark.parametrize("scheme", ERRORS, ids=str)
def test_every_expert_is_quantised_by_itself(scheme):
    weights = torch.randn(3, 130, 256, dtype=torch.bfloat16)
    packed = quantize(weights, scheme)
    assert packed.dtype == packed.scale.dtype == torch.bfloat16
    alone = quantize(weights[1], scheme)
    assert torch.equal(packed.dequantized()[1], alone.dequantized())


@pytest.mark.parametrize("scheme", ERRORS, ids=str)
def test_weights_of_nothing_stay_nothing(scheme):
    weights = torch.zeros(4, 512, dtype=torch.bfloat16)
    weights[1] = torch.finfo(torch.bfloat16).tiny / 8
    weights[2, 0] = 3.0
    found = quantize(weights, scheme).dequantized()
    assert torch.equal(found[[0, 3]], weights[[0, 3]]) and found.isfinite().all()
    assert found[2, 0].item() == pytest.approx(3.0, rel=0.02)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="w: group=128 is not allowed"):
        quantize(torch.zeros(4, 192), Scheme(4, 128), "w")
    with pytest.raises(ValueError, match=r"w\[1\] has numbers that are not finite"):
        quantize(torch.tensor([0.0, float("inf")])[:, None, None].expand(2, 4, 64), Scheme(4), "w")
