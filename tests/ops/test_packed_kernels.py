"""Packed weights written out by a kernel."""

import pytest
import torch
from interpreter import DEVICE, IS_INTERPRETED, with_kernels
from packed_weights import SCHEMES, random_packed

from kimi_linear.ops.packed import unpacking

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]
DTYPES = [torch.float32] if IS_INTERPRETED else [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def any_device(monkeypatch):
    monkeypatch.setattr(unpacking, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(unpacking, "DTYPES", (*unpacking.DTYPES, torch.float32))


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", [(2, 40, 384), (33, 576)], ids=str)
def test_unpacked_weights_are_those_of_the_definition(shape, scheme, dtype):
    packed, expected = random_packed(scheme, shape, dtype, DEVICE)
    assert unpacking.can_unpack(packed)
    assert torch.equal(packed.dequantized(), expected)


@with_kernels
def test_scales_in_float32_are_not_rounded():
    scheme = SCHEMES["float8 blocks"]
    packed, expected = random_packed(scheme, (256, 384), torch.float32, DEVICE)
    narrow = packed.to(torch.float32 if IS_INTERPRETED else torch.bfloat16)
    assert torch.equal(narrow.dequantized(), expected.to(narrow.dtype))
