"""Inputs in fixed point, and packed weights by them, against the same sums in float64."""

import pytest
import torch
from decode_models import DEVICES, small_grids  # noqa: F401
from packed_weights import SCHEMES, random_packed

from kimi_linear.decode import fixed_point
from kimi_linear.decode.fixed_point import FixedPoint, FixedProjection
from kimi_linear.decode.fixed_point_kernels import add_norm_fixed_kernel
from kimi_linear.ops.runtime import power_of_two
from kimi_linear.schemes import Scheme

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.interpreted,
    pytest.mark.usefixtures("small_grids", "many_splits"),
    pytest.mark.parametrize("device", DEVICES),
]
RUN = 32


@pytest.fixture
def many_splits(monkeypatch):
    """As many parts of a sum as a projection may have, on any device."""
    monkeypatch.setattr(fixed_point, "MIN_BLOCKS", 1)


def written(x, weight=None):
    """The norm of rows [B, D], by the kernel, and in fixed point."""
    num_rows, size = x.shape
    fixed = FixedPoint(num_rows, size, SCHEMES.values(), x.device)
    out = torch.empty_like(x)
    counters = torch.zeros(num_rows, 4, dtype=torch.int64, device=x.device)
    if weight is None:
        weight = torch.linspace(0.5, 2.0, size, device=x.device)
    add_norm_fixed_kernel[(num_rows,)](
        x.clone(),
        x,
        weight,
        out,
        *fixed.parts,
        x,
        counters,
        1e-6,
        1,
        D=size,
        P=fixed.size,
        PLACES=power_of_two(size),
        PARTS=0,
        HAS_LOG=False,
        num_warps=8,
        IS_LINKED=False,
    )
    return out, fixed


def numbers_of(fixed, size):
    """float64 [B, size]: what the halves say."""
    _, _, halves, unit = fixed.parts
    high, low = halves.double().unbind(1)
    return ((256 * high + low) * unit.double().repeat_interleave(RUN, dim=1))[:, :size]


def of_columns(columns, size):
    """[B, size] of columns [B, 4, P] or [B, 4, P, ..], and whether all else is 0."""
    lanes = columns.unflatten(2, (-1, RUN, 4))  # [B, column's run, tiles, lane, run]
    own = torch.stack([lanes[:, run, :, :, run] for run in range(4)], dim=2)
    is_rest_zero = bool(lanes.count_nonzero() == own.count_nonzero())
    return own.flatten(1, 3)[:, :size], is_rest_zero


@pytest.mark.parametrize("size", [96, 256, 320])
def test_all_forms_say_what_the_norm_gives(size, device):
    x = torch.randn(3, size, device=device) * torch.tensor([[1.0], [1e-4], [1e3]], device=device)
    out, fixed = written(x)
    columns, wide_columns, _, unit = fixed.parts
    largest = out.abs().amax(1, keepdim=True).double()
    found = numbers_of(fixed, size)
    assert ((found - out).abs() <= 0.51 * largest / 32512).all()
    high, is_high_alone = of_columns(columns[:, 0::2], size)
    low, is_low_alone = of_columns(columns[:, 1::2], size)
    wide, is_wide_alone = of_columns(wide_columns, size)
    assert is_high_alone and is_low_alone and is_wide_alone
    units = unit.double().repeat_interleave(RUN, dim=1)[:, :size]
    assert torch.equal((256 * high.double() + low.double()) * units, found)
    assert ((wide.double() * units - out).abs() <= 2**-11 * out.abs() + 1e-9 * largest).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value, device):
    """In one number, of which the norm's scale knows nothing; in others' runs too."""
    weight = torch.ones(96, device=device)
    weight[40] = value
    _, fixed = written(torch.randn(2, 96, device=device), weight)
    assert not numbers_of(fixed, 96).isfinite().any()


def test_rows_do_not_see_each_other(device):
    x = torch.randn(2, 96, device=device)
    alone = written(x[:1].clone())[1]
    x[1, 40] = float("nan")
    both = written(x)[1]
    for mine, other in zip(alone.parts, both.parts, strict=True):
        assert torch.equal(mine[0], other[0])
    assert not numbers_of(both, 96)[1].isfinite().any()


def product(x, fixed, *weights, splits=1, up=None):
    """What the launch gives: float32 [B, n], parts of a sum added up."""
    projection = FixedProjection(weights, fixed, is_linked=False, up=up, most_splits=splits)
    assert projection.splits == splits
    width = sum(weight.shape[0] for weight in weights)
    out = torch.full((len(x), splits, width), float("nan"), device=x.device)
    projection.launch(x, out if splits > 1 else out[:, 0])
    return out.sum(1)


def tolerance(scheme):
    """Float8 weights are multiplied by 11 bits of their inputs."""
    return 1e-3 if scheme.is_float else 2e-6


# Beside those of `packed_weights.py`: zeros of 3 and 8 bits, groups that end elsewhere than tiles.
MORE = {
    "3 bits, zeros": Scheme(3, 32, is_symmetric=False),
    "8 bits, zeros": Scheme(8, 256, is_symmetric=False),
    "8 bits, groups across tiles": Scheme(8, 96),
    "float8 a row": Scheme(8, None, is_float=True),
}


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*SCHEMES, *MORE])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_products(num_rows, name, scale_dtype, device):
    scheme = {**SCHEMES, **MORE}[name]
    size = 576 if scheme.group == 96 else 768 if scheme.group == 256 else 640
    x, fixed = written(torch.randn(num_rows, size, device=device))
    first, second = (
        random_packed(scheme, (rows, size), scale_dtype, device, factor=0.01)[0].to(torch.float32)
        for rows in (40, 33)
    )
    plain = torch.randn(19, size, device=device)
    inputs = numbers_of(fixed, size)
    sums = [inputs @ each.dequantized().double().t() for each in (first, second)]
    found = product(x, fixed, first, second, plain).double()
    scale = max(each.abs().max() for each in sums)
    atol = tolerance(scheme) * scale
    torch.testing.assert_close(found[:, :73], torch.cat(sums, dim=1), rtol=0, atol=atol)
    # GPUs round float32 to 10 bits in plain products
    expected = x.double() @ plain.double().t()
    torch.testing.assert_close(found[:, 73:], expected, rtol=0, atol=2e-3 * expected.abs().max())
    parts = product(x, fixed, first, splits=2).double()
    torch.testing.assert_close(parts, sums[0], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["3 bits", "float8 blocks"])
def test_gated_products(name, device):
    scheme, size = SCHEMES[name], 384
    x, fixed = written(torch.randn(2, size, device=device))
    gate, up = (
        random_packed(scheme, (48, size), torch.float32, device, factor=0.01)[0] for _ in range(2)
    )
    inputs = numbers_of(fixed, size)
    first, second = (inputs @ each.dequantized().double().t() for each in (gate, up))
    expected = torch.nn.functional.silu(first) * second
    found = product(x, fixed, gate, up=up).double()
    atol = 3 * tolerance(scheme) * expected.abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
