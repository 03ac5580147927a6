"""Products of 16-bit factors in float32."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close

from kimi_linear.ops.wide_product import add_wide_product, wide_linear, wide_product

pytestmark = pytest.mark.kernels

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_that_of_wide_copies(dtype, autocast):
    x, weight = (torch.randn(n, 40).to(dtype).requires_grad_() for n in (7, 6))
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.linear(x.to(wide), weight.to(wide))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual = wide_linear(x, weight)
        assert torch.equal(wide_linear(x.detach(), weight.detach()), expected)
    assert torch.equal(actual, expected)
    grads = (torch.autograd.grad(out.sin().sum(), (x, weight)) for out in (actual, expected))
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_linear_keeps_no_wide_copies():
    kept = []
    x, weight = (torch.randn(n, 40).bfloat16().requires_grad_() for n in (7, 6))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype), lambda t: t):
        wide_linear(x, weight)
    assert set(kept) == {torch.bfloat16}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products(dtype, device):
    a, b = (torch.randn(size, device=device).to(dtype) for size in ((7, 40), (40, 6)))
    total = torch.randn(7, 6, device=device)
    expected, exact = total.double() + a.double() @ b.double(), torch.float32
    add_wide_product(total, a, b)
    tolerance = dtype if device == "cpu" else exact
    assert_close(total, expected, tolerance)
    product = wide_product(a, b, torch.float32)
    assert product.dtype == torch.float32
    assert_close(product, a.double() @ b.double(), tolerance)
