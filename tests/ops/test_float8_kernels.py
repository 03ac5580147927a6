"""Products of float8 rows and weights beside float64: on a GPU, or by Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from float8_references import (
    assert_rounded,
    exact,
    in_full,
    reference_rows,
    relative,
    round_as_torch,
)
from interpreter import DEVICE, IS_INTERPRETED, draw, with_kernels
from packed_weights import random_packed

from kimi_linear.ops.experts import float8_kernels
from kimi_linear.ops.experts.sort import sort_pairs
from kimi_linear.ops.packed import float8
from kimi_linear.ops.packed.rounding import quantize
from kimi_linear.schemes import Scheme

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]
DTYPE = torch.float32 if IS_INTERPRETED else torch.bfloat16
# The root mean square of errors. In bfloat16, rounding the result costs 1.7e-3. Hopper's tensor
# cores cut products off 13 bits behind the point of the largest that they add at once (DeepSeek-V3,
# section 3.3.2), which costs a sum of 128 some 4e-4.
CLOSE = 2e-6 if IS_INTERPRETED else 4e-3
# Of one number, by the largest of its block. So cut off, silu(gate) * up is up to 2e-3 off.
SLACK = 1e-5 if IS_INTERPRETED else 1e-2
SCHEMES = {
    "blocks": Scheme(8, 128, is_float=True, rows=128, activation_scheme="dynamic"),
    "blocks of few rows": Scheme(8, 128, is_float=True, rows=24, activation_scheme="dynamic"),
    "large groups": Scheme(8, 256, is_float=True, rows=16, activation_scheme="dynamic"),
    "a row": Scheme(8, None, is_float=True, activation_scheme="dynamic"),
}
TILES = {"halves": (32, 32, 2, 4, 2), "one": (16, 64, 1, 4, 2)}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    if not IS_INTERPRETED:
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("needs products of float8 numbers")
        return
    round_as_torch(monkeypatch)
    monkeypatch.setattr(float8, "DEVICES", ("cpu",))
    monkeypatch.setattr(float8, "DTYPES", (torch.float32,))


def small_tiles(monkeypatch, tile):
    if IS_INTERPRETED:
        rows, _, _, *launch = tile
        monkeypatch.setattr(float8, "SMALL_TILE", tile)
        monkeypatch.setattr(float8_kernels, "DOWN_TILES", 4 * (tile,))
        monkeypatch.setattr(float8_kernels, "GATE_UP_TILES", 4 * ((rows, *launch),))


@with_kernels
@pytest.mark.parametrize(("rows", "inputs"), [(2, 128), (37, 320)])
def test_rows_are_quantised_as_by_torch(rows, inputs):
    x = draw(rows, inputs, dtype=DTYPE)
    x[0] *= 1e4
    x[-1, :128] = 0
    found, expected = float8.quantize_rows(x), reference_rows(x)
    torch.testing.assert_close(found.scale, expected.scale)
    assert torch.equal(in_full(found, inputs) == 0, in_full(expected, inputs) == 0)
    # an ulp of the scale may move a number that lies between two of float8
    assert relative(in_full(found, inputs), in_full(expected, inputs)) < 1e-3
    assert relative(in_full(found, inputs), x.double()) < 0.03


@with_kernels
@pytest.mark.parametrize("inputs", [128, 320])
def test_rows_are_written_to_each_of_their_places(inputs):
    x, places = draw(37, inputs, dtype=DTYPE), torch.randperm(37 * 3, device=DEVICE).view(37, 3)
    once, found = float8.quantize_rows(x), float8.quantize_rows(x, places)
    assert found.codes.shape[0] == found.scale.shape[1] == 37 * 3
    for each in places.t():
        assert torch.equal(found.codes[each].view(torch.uint8), once.codes.view(torch.uint8))
        assert torch.equal(found.scale[:, each], once.scale)


@with_kernels
@pytest.mark.parametrize(
    ("scheme", "has_memory", "expected"),
    [("blocks", True, "abbc"), ("a row", True, "bbbc"), ("blocks", False, "dddd")],
)
def test_tiles_by_rows_of_an_expert(monkeypatch, scheme, has_memory, expected):
    monkeypatch.setattr(float8_kernels, "has_large_memory", lambda device: has_memory)
    weights, _ = random_packed(SCHEMES[scheme], (10, 128, 128), DTYPE, DEVICE)
    rows = 512, 511, 64, 63
    found = [float8_kernels._tile("abcd", 10 * each, weights, DEVICE) for each in rows]
    assert "".join(found) == expected


@with_kernels
def test_a_number_that_is_not_finite_stays_so():
    x = draw(3, 256, dtype=DTYPE)
    x[0, 5], x[1, 200] = float("nan"), float("inf")
    rows = float8.quantize_rows(x)
    finite = in_full(rows, 256).isfinite()
    assert not finite[0, 5] and not finite[1, 200] and finite[2].all()
    if not IS_INTERPRETED:  # which takes float8's NaN for 480
        weights, _ = random_packed(SCHEMES["blocks"], (40, 256), DTYPE, DEVICE)
        out = float8.float8_linear(rows, weights, DTYPE)
        assert not out[:2].isfinite().any() and out[2].isfinite().all()


@with_kernels
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("shape", [(70, 200, 512), (33, 56, 256)], ids=str)
def test_products_of_rows(monkeypatch, shape, scheme, tile):
    small_tiles(monkeypatch, tile)
    (num_rows, num_outputs, num_inputs) = shape
    weights, _ = random_packed(scheme, (num_outputs, num_inputs), DTYPE, DEVICE)
    assert float8.takes_float8(weights)
    rows = float8.quantize_rows(draw(num_rows, num_inputs, dtype=DTYPE))
    found = float8.float8_linear(rows, weights, DTYPE)
    assert relative(found, in_full(rows, num_inputs) @ exact(weights).t()) < CLOSE


@with_kernels
def test_blocks_that_inputs_do_not_fill(monkeypatch):
    small_tiles(monkeypatch, TILES["one"])
    weights, _ = random_packed(SCHEMES["blocks"], (200, 200), DTYPE, DEVICE)
    rows = float8.quantize_rows(draw(20, 200, dtype=DTYPE))
    found = float8.float8_linear(rows, weights, DTYPE)
    assert relative(found, in_full(rows, 200) @ exact(weights).t()) < CLOSE


@with_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_of_any_dtype(monkeypatch, dtype):
    if IS_INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("numpy has no bfloat16")
    small_tiles(monkeypatch, TILES["halves"])
    weights, _ = random_packed(SCHEMES["blocks"], (256, 640), dtype, DEVICE)
    weights = weights.to(DTYPE)
    assert weights.scale.dtype == dtype
    rows = float8.quantize_rows(draw(40, 640, dtype=DTYPE))
    expected = in_full(rows, 640) @ exact(weights).t()
    assert relative(float8.float8_linear(rows, weights, DTYPE), expected) < CLOSE


@with_kernels
def test_error_beside_rows_in_full():
    """What the quantised activations cost: that of numbers with three bits behind the point."""
    x, w = draw(64, 1024, dtype=DTYPE), draw(256, 1024, dtype=DTYPE)
    weights = quantize(w, SCHEMES["blocks"])
    found = float8.float8_linear(float8.quantize_rows(x), weights, DTYPE)
    error = relative(found, x.double() @ exact(weights).t())
    assert 0.02 < error < 0.03


@with_kernels
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("scheme", ["blocks", "blocks of few rows", "a row"])
@pytest.mark.parametrize(("tokens", "hidden", "width"), [(1, 256, 128), (50, 384, 72)])
def test_products_by_expert(monkeypatch, tokens, hidden, width, scheme, tile):
    small_tiles(monkeypatch, tile)
    scheme = SCHEMES[scheme]
    up, _ = random_packed(scheme, (6, 2 * width, hidden), DTYPE, DEVICE, factor=1e-3)
    down, _ = random_packed(scheme, (6, hidden, width), DTYPE, DEVICE, factor=1e-3)
    up_full, down_full = exact(up), exact(down)
    experts = torch.rand(tokens, 8, device=DEVICE).topk(3, dim=-1).indices  # 6 and 7: other ranks'
    experts[experts == 2] = 4
    order, ends, _, places = sort_pairs(experts, 6)
    stops = [0, *ends.tolist()]
    rows = float8.quantize_rows(draw(tokens, hidden, dtype=DTYPE), places)
    inner = float8_kernels.gate_up(rows, ends, up)
    pairs = float8_kernels.down(inner, order, ends, down, DTYPE)
    x, y = in_full(rows, hidden), in_full(inner, width)
    for expert, (start, end) in enumerate(zip(stops, stops[1:], strict=False)):
        if start == end:
            continue
        gate, value = (x[start:end] @ up_full[expert].t()).chunk(2, dim=1)
        own = float8.Float8Rows(inner.codes[start:end], inner.scale[:, start:end])
        assert_rounded(own, F.silu(gate) * value, SLACK)
        assert not in_full(own, own.codes.shape[1])[:, width:].any()
        expected = y[start:end] @ down_full[expert].t()
        assert relative(pairs[order[start:end]], expected) < CLOSE
