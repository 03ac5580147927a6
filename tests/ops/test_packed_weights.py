"""Weights in few bits: the order of their codes, and the tensor in a parameter's place."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from packed_weights import SCHEMES, random_packed
from torch import nn

from kimi_linear.ops.packed import weights
from kimi_linear.ops.packed.codes import pack, unpack
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import Scheme

by_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("num_inputs", [32, 256, 416])
def test_codes_come_back_from_words(bits, num_inputs):
    scheme = Scheme(bits, 32)
    codes = torch.randint(0, 1 << bits, (2, 5, num_inputs), dtype=torch.uint8)
    planes = pack(codes, scheme)
    assert torch.equal(unpack(planes, scheme, num_inputs), codes)
    words = scheme.num_words(num_inputs)
    assert all(plane.shape == (2, 5, words) for plane in planes)
    assert sum(plane.nbytes for plane in planes) == 10 * words * scheme.slots * bits // 8


@by_scheme
def test_dequantized_weights_are_those_of_the_definition(scheme):
    packed, expected = random_packed(scheme)
    assert torch.equal(packed.dequantized(), expected)
    assert packed.shape == expected.shape and packed.dtype == expected.dtype
    assert packed.held_bytes() == sum(part.nbytes for part in packed.parts().values())


@by_scheme
def test_computations_see_the_weights(scheme):
    packed, expected = random_packed(scheme, (40, 384), dtype=torch.float32)
    x = torch.randn(7, 384, requires_grad=True)
    F.linear(x, packed).square().sum().backward()
    grad, x.grad = x.grad, None
    F.linear(x, expected).square().sum().backward()
    assert torch.equal(grad, x.grad)
    ids = torch.tensor([[0, 39], [5, 5]])
    assert torch.equal(F.embedding(ids, packed), expected[ids])


@by_scheme
@torch.no_grad()
def test_large_layers_are_written_out_in_parts(monkeypatch, scheme):
    """The 48B model's head would take 755 MB at once."""
    found, own = [], PackedWeights.dequantized

    def noted(self):
        found.append(self.shape[0])
        return own(self)

    packed, expected = random_packed(scheme, (300, 384))
    x, bias = torch.randn(2, 3, 384, dtype=packed.dtype), torch.randn(300, dtype=packed.dtype)
    monkeypatch.setattr(weights, "WRITTEN_BYTES", 130 * 384 * 2)
    monkeypatch.setattr(PackedWeights, "dequantized", noted)
    for extra in (None, bias):
        wanted = F.linear(x, expected, extra)
        torch.testing.assert_close(F.linear(x, packed, extra), wanted, rtol=2e-2, atol=0.5)
    step = 128 if scheme.rows == 128 else 130
    assert found == 2 * [step, step, 300 - 2 * step]
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x.float(), packed).dtype == torch.bfloat16


@by_scheme
def test_single_experts_stay_packed(scheme):
    packed, expected = random_packed(scheme)
    for index in (1, slice(1, 3), torch.tensor([2, 0])):
        part = packed[index]
        assert isinstance(part, PackedWeights)
        assert torch.equal(part.dequantized(), expected[index])


def test_parts_are_filled_in():
    packed, _ = random_packed(SCHEMES["4 bits, zeros"])
    other, expected = random_packed(SCHEMES["4 bits, zeros"], (16, 384))
    target = PackedWeights.empty((3, 40, 384), packed.scheme, packed.dtype, "cpu")
    for part, source in zip(target.parts().values(), packed.parts().values(), strict=True):
        part.copy_(source)
    target.fill((1, slice(8, 24)), other)
    assert torch.equal(target.dequantized()[1, 8:24], expected)
    assert torch.equal(target.dequantized()[0], packed.dequantized()[0])
    with pytest.raises(ValueError, match="bits=8"):
        target.fill(0, random_packed(Scheme(8, None), (40, 384))[0])


def test_it_is_a_parameter_that_moves_and_is_pickled():
    packed, expected = random_packed(SCHEMES["3 bits"], (40, 384))
    linear = nn.Linear(384, 40, bias=False)
    linear.weight = nn.Parameter(packed, requires_grad=False)
    assert isinstance(linear.weight, PackedWeights) and isinstance(linear.weight, nn.Parameter)
    assert linear.to(torch.float64)(torch.eye(384, dtype=torch.float64)).dtype == torch.float64
    assert torch.equal(pickle.loads(pickle.dumps(packed)).dequantized(), expected)
    with pytest.raises(ValueError, match="cannot be written to"):
        packed.zero_()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheme(5), "bits=5 is not allowed: it must be one of"),
        (lambda: Scheme(4, 48), "group=48 is not allowed: it must be a multiple of 32"),
        (lambda: Scheme(4, is_float=True), "is_float with bits=4"),
        (
            lambda: Scheme(8, activation_scheme="dynamic"),
            "activation_scheme='dynamic' .* None with",
        ),
        (
            lambda: Scheme(8, is_float=True, activation_scheme="static"),
            "activation_scheme='static' is not allowed: it must be None or 'dynamic'",
        ),
        (lambda: Scheme(8, rows=0), "rows=0 is not allowed"),
        (lambda: Scheme(4, 128).check_size("w", 192), "w: group=128 .* must divide the 192 inputs"),
    ],
)
def test_schemes_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_parts_of_other_sizes_are_refused():
    packed, _ = random_packed(SCHEMES["4 bits"], (40, 384))
    low = packed.planes[0]
    with pytest.raises(ValueError, match=r"scale of \[5, 40, 2\] .* it must be \[6, 40, 2\]"):
        PackedWeights((low,), packed.scale[1:], None, packed.scheme, 384, packed.dtype)
    with pytest.raises(ValueError, match="zero=True is not allowed"):
        PackedWeights((low,), packed.scale, packed.scale, packed.scheme, 384, packed.dtype)
    with pytest.raises(ValueError, match=r"plane 0 of \[40, 32\]"):
        PackedWeights((low[:, :32],), packed.scale, None, packed.scheme, 384, packed.dtype)
