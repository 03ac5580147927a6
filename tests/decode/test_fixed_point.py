"""Inputs in fixed point, and packed weights by them, against the same sums in float64."""

import pytest
import torch
from decode_models import DEVICES, small_grids  # noqa: F401
from packed_weights import SCHEMES, random_packed

from kimi_linear.decode import fixed_point
from kimi_linear.decode.few_rows import cut
from kimi_linear.decode.fixed_point import FixedPoint, FixedProjection
from kimi_linear.decode.fixed_point_kernels import add_norm_fixed_kernel, add_norm_score_kernel
from kimi_linear.ops.runtime import power_of_two
from kimi_linear.schemes import Scheme

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.interpreted,
    pytest.mark.usefixtures("small_grids", "many_splits"),
    pytest.mark.parametrize("device", DEVICES),
]
RUN, EVERY = 32, tuple(SCHEMES.values())


@pytest.fixture
def many_splits(monkeypatch):
    """As many parts of a sum as a projection may have, on any device."""
    monkeypatch.setattr(fixed_point, "MIN_BLOCKS", 1)


def written(x, weight=None, schemes=EVERY):
    """The norm of rows [B, D], by the kernel, and in fixed point."""
    num_rows, size = x.shape
    fixed = FixedPoint(num_rows, size, schemes, x.device)
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
    in_order = halves.unflatten(2, (-1, 128, 2)).transpose(3, 4).flatten(2)
    high, low = in_order.double().unbind(1)
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


@pytest.mark.parametrize(
    ("name", "kept"), [("3 bits", 2), ("8 bits a row", 0), ("float8 blocks", 1)]
)
def test_only_what_weights_want_is_written(name, kept, device):
    x = torch.randn(2, 320, device=device)
    every, own = written(x)[1], written(x, schemes=[SCHEMES[name]])[1]
    for i, (mine, other) in enumerate(zip(own.parts, every.parts, strict=True)):
        assert torch.equal(mine, other) if i in (kept, 3) else mine is None


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("size", "experts"), [(96, 5), (256, 8), (320, 9)])
def test_a_router_norms_for_itself(size, experts, parts, device):
    """Its logits, and all that the norm alone would have written."""
    x, more = torch.randn(3, size, device=device), torch.randn(3, parts, size, device=device)
    norm, router = torch.rand(size, device=device), torch.randn(experts, size, device=device)
    sums, out = torch.empty_like(x), torch.empty_like(x)
    logits = torch.full((3, experts), torch.nan, device=device)
    fixed = FixedPoint(3, size, SCHEMES.values(), x.device)
    large, small = cut(size)
    before = x.clone()
    add_norm_score_kernel[(3 + -(-experts // 4),)](
        x,
        more,
        norm,
        router,
        sums,
        out,
        *fixed.parts,
        logits,
        1e-6,
        experts,
        D=size,
        P=fixed.size,
        PLACES=power_of_two(size),
        LARGE=large,
        SMALL=small,
        PARTS=parts,
        ROWS=3,
        BLOCK=4,
        num_warps=8,
        IS_LINKED=False,
    )
    assert torch.equal(x, before)
    torch.testing.assert_close(sums, x + more.sum(1))
    alone, expected = written(sums, norm)
    torch.testing.assert_close(out, alone)
    wide = sums.double()
    wide *= norm * (wide.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(logits.double(), wide @ router.double().T, rtol=1e-5, atol=1e-4)
    found, other = numbers_of(fixed, size), numbers_of(expected, size)
    torch.testing.assert_close(found, other, rtol=0, atol=2 * float(expected.parts[3].max()))


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


# Beside those of `packed_weights.py`: zeros of 3 and 8 bits, two groups a tile with zeros, groups
# that end elsewhere than tiles.
MORE = {
    "3 bits, zeros of two groups": Scheme(3, 64, is_symmetric=False),
    "4 bits, zeros of two groups": Scheme(4, 64, is_symmetric=False),
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
    size = {96: 576, 256: 768, 64: 448}.get(scheme.group, 640)
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
