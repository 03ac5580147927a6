"""Products of 16-bit numbers with sums in float32 that stay in float32.

Such products are exact in float32, so that a GPU needs no wide copies of the factors, and the
backward pass none of them kept.

Shapes: T tokens, D inputs, E outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kimi_linear.ops.runtime import is_traced, needs_grad, no_autocast


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; where there is no product for that, the one in the factors' dtype."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        return torch.ops.aten.mm.dtype(a, b, dtype)
    return (a @ b).to(dtype)


def add_wide_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in `total`'s dtype where there is a product for that."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.add_(a @ b)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, D] by weight [E, D], in at least float32, also under autocast."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with no_autocast(x.device):
        is_plain = type(weight) in (nn.Parameter, Tensor) and x.dtype == weight.dtype != wide
        if is_plain and not is_traced():
            return _WideLinear.apply(x, weight) if needs_grad(x, weight) else _forward(x, weight)
        return F.linear(x.to(wide), weight.to(wide))


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    if x.is_cuda and "dtype" in torch.ops.aten.mm.overloads():
        return torch.ops.aten.mm.dtype(x, weight.t(), torch.float32)
    return F.linear(x.float(), weight.float())


class _WideLinear(torch.autograd.Function):
    """Keeps the 16-bit factors instead of wide copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = None
        with no_autocast(x.device):
            # rounded as the result will be; with less range than bfloat16 small ones would vanish
            if x.is_cuda and x.dtype == torch.bfloat16:
                grad = grad.to(x.dtype)
            if ctx.needs_input_grad[0]:
                dx = (grad @ weight.to(grad.dtype)).to(x.dtype)
            if ctx.needs_input_grad[1]:
                dweight = wide_product(grad.t(), x.to(grad.dtype), torch.float32).to(weight.dtype)
        return dx, dweight
