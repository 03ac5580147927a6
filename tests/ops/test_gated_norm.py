"""The gated norm's kernels beside torch in float64: on a GPU, or interpreted."""

from types import SimpleNamespace

import pytest
import torch
from interpreter import DTYPES, draw, with_kernels
from tolerance import assert_close

from kimi_linear.ops import gated_norm
from kimi_linear.ops.gated_norm import _GatedNorm, gated_rms_norm

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]

EPS = 1e-5


@with_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 70, 3, 128), (1, 17, 1, 40), (1, 300, 2, 64)])
def test_output_and_gradients(shape, dtype):
    inputs = [draw(*shape, dtype=dtype), draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype)]
    grad = draw(*shape, dtype=dtype)
    exact = [x.double().requires_grad_() for x in inputs]
    wanted = gated_rms_norm(*exact, EPS, backend="torch")
    inputs = [x.requires_grad_() for x in inputs]
    out = _GatedNorm.apply(*inputs, EPS)
    assert out.dtype == dtype and out.shape == shape
    assert_close(out, wanted.to(dtype), dtype, "output")
    found = torch.autograd.grad(out, inputs, grad)
    expected = torch.autograd.grad(wanted, exact, grad.double())
    for name, each, other in zip(("x", "gate", "weight"), found, expected, strict=True):
        assert each.dtype == dtype
        assert_close(each, other.to(dtype), dtype, name)


@with_kernels
def test_gradients_that_are_not_contiguous():
    x, gate, weight = draw(1, 40, 2, 32), draw(1, 40, 2, 32), draw(32).requires_grad_()
    grad = draw(1, 40, 32, 2).transpose(2, 3)
    wanted = gated_rms_norm(x, gate, weight, EPS, backend="torch")
    found = _GatedNorm.apply(x, gate, weight, EPS)
    expected = torch.autograd.grad(wanted, weight, grad)[0]
    assert_close(torch.autograd.grad(found, weight, grad)[0], expected, torch.float32)


@with_kernels
def test_no_rows():
    x = draw(1, 0, 2, 32).requires_grad_()
    weight = draw(32).requires_grad_()
    out = _GatedNorm.apply(x, draw(1, 0, 2, 32), weight, EPS)
    assert out.shape == x.shape
    dx, dweight = torch.autograd.grad(out.sum(), (x, weight))
    assert dx.shape == x.shape and not dweight.any()


@pytest.mark.parametrize(
    ("is_compiled", "is_recorded", "expected"),
    [(False, False, "ours"), (True, False, "FLA's"), (True, True, "FLA's")],
)
def test_a_compiler_does_not_see_them(is_compiled, is_recorded, expected, monkeypatch):
    """It cannot follow their launches."""
    monkeypatch.setattr(gated_norm, "triton", object())
    monkeypatch.setattr(gated_norm, "resolve_backend", lambda x, backend: "fla")
    monkeypatch.setattr(gated_norm, "norm_kernel", lambda: lambda *args, **kwargs: "FLA's")
    monkeypatch.setattr(gated_norm, "launch_gated_norm", lambda *args: "ours")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiled)
    x = SimpleNamespace(is_cuda=True, requires_grad=is_recorded, contiguous=lambda: x)
    assert gated_rms_norm(x, x, x, EPS) == expected


@pytest.mark.gpu
def test_a_gpu_takes_them(monkeypatch):
    x, gate = (torch.randn(1, 5, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    calls = []
    launch = gated_norm.launch_gated_norm
    monkeypatch.setattr(
        gated_norm, "launch_gated_norm", lambda *args: calls.append(1) or launch(*args)
    )
    gated_rms_norm(x, gate, weight.detach(), EPS)
    assert calls == [1]
    gated_rms_norm(x, gate, weight, EPS).sum().backward()
    assert calls == [1, 1] and weight.grad is not None
