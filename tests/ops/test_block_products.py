"""Products of float8 blocks by cuBLAS: what it takes, and on a GPU that has them, beside ours."""

import pytest
import torch
from float8_references import exact, in_full, relative
from packed_weights import random_packed

from kimi_linear.ops.chip import architecture
from kimi_linear.ops.packed import float8, library
from kimi_linear.schemes import Scheme

BLOCKS = Scheme(8, 128, is_float=True, rows=128, activation_scheme="dynamic")
A_ROW = Scheme(8, None, is_float=True, activation_scheme="dynamic")


@pytest.mark.parametrize(
    ("rows", "shape", "scheme", "dtype", "expected"),
    [
        (64, (256, 384), BLOCKS, torch.bfloat16, True),
        (63, (256, 384), BLOCKS, torch.bfloat16, False),
        (64, (200, 384), BLOCKS, torch.bfloat16, False),
        (64, (256, 320), BLOCKS, torch.bfloat16, False),
        (64, (256, 384), BLOCKS, torch.float16, False),
        (64, (256, 384), A_ROW, torch.bfloat16, False),
    ],
)
def test_what_it_takes(rows, shape, scheme, dtype, expected):
    weights, _ = random_packed(scheme, shape)
    assert library.fits(rows, weights, dtype) == expected


def test_scales_are_made_once_and_again_when_they_change():
    weights, _ = random_packed(BLOCKS, (256, 640))
    found = library.block_scales(weights)
    assert found.shape == (8, 2) and found.stride() == (1, 8)
    assert torch.equal(found[:5].t(), weights.scales().float()) and not found[5:].any()
    assert library.block_scales(weights) is found
    weights.scale.mul_(2)
    assert torch.equal(library.block_scales(weights), 2 * found)


def test_scales_made_in_inference_mode_can_be_written_to():
    weights, _ = random_packed(BLOCKS, (256, 640))
    with torch.inference_mode():
        found = library.block_scales(weights)
    found.copy_(2 * found)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 256, 384), (4096, 4096, 2304), (2500, 2304, 9216)])
def test_products_of_blocks(monkeypatch, shape):
    num_rows, num_outputs, num_inputs = shape
    if not library.has_block_products(architecture(torch.device("cuda"))):
        pytest.skip("needs a Hopper GPU and CUDA 12.9")
    weights, _ = random_packed(BLOCKS, (num_outputs, num_inputs), device="cuda")
    rows = float8.quantize_rows(torch.randn(num_rows, num_inputs, device="cuda").bfloat16())
    found = float8.float8_linear(rows, weights, torch.bfloat16)
    assert relative(found, in_full(rows, num_inputs) @ exact(weights).t()) < 4e-3
    monkeypatch.setattr(float8, "USES_LIBRARY", False)
    assert relative(float8.float8_linear(rows, weights, torch.bfloat16), found.double()) < 6e-3
