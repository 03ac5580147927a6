"""silu(gate) * up, and its backward pass: in torch, and as Triton kernels that read their inputs
once and write their outputs once. Sums are in float32, in a fixed order.

Shapes: P rows (tokens, or pairs of a token and one of its experts), I width.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import ceil_div, has_kernels, jit, power_of_two, tl

COLUMNS = 1024  # at once


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [P, I], in at least float32; rows may be strided. Records no graph."""
    if has_kernels(gate, up):
        return launch_gated_silu(gate, up)
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def launch_gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    (P, size), out = gate.shape, gate.new_empty(gate.shape)
    if P:
        grid = (P, ceil_div(size, COLUMNS))
        with torch.cuda.device_of(gate):
            _gated_silu[grid](gate, up, out, gate.stride(0), up.stride(0), size, BLOCK=COLUMNS)
    return out


def gated_silu_backward(
    gate_up: Tensor, grad: Tensor, weights: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Backward pass of weight * silu(gate) * up.

    Args:
        gate_up: [P, 2I].
        grad: [P, I], of the product.
        weights: P numbers in any shape; None for ones.
        order: [P] int64, where among the weights each row's is.

    Returns:
        The gradient of `gate_up` [P, 2I], that of `weights` or None, and the product [P, I].
    """
    if has_kernels(gate_up, grad):
        return launch_gated_silu_backward(gate_up, grad, weights, order)
    return reference_gated_silu_backward(gate_up, grad, weights, order)


def reference_gated_silu_backward(
    gate_up: Tensor, grad: Tensor, weights: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`gated_silu_backward` in torch."""
    wide = torch.promote_types(gate_up.dtype, torch.float32) if weights is None else weights.dtype
    gate, up = gate_up.to(wide).chunk(2, dim=1)
    sigmoid, grad = gate.sigmoid(), grad.to(wide)
    silu, weight = gate * sigmoid, 1 if weights is None else weights.flatten()[order][:, None]
    inner, scaled = silu * up, grad * weight
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    grad_gate_up = torch.cat([scaled * up * slope, scaled * silu], dim=1).to(gate_up.dtype)
    grad_weights = None
    if weights is not None:
        grad_weights = torch.empty_like(weights).flatten()
        grad_weights[order] = (grad * inner).sum(dim=1)
        grad_weights = grad_weights.view_as(weights)
    return grad_gate_up, grad_weights, (inner * weight).to(gate_up.dtype)


def launch_gated_silu_backward(
    gate_up: Tensor, grad: Tensor, weights: Tensor | None = None, order: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    P, size = grad.shape
    grad_gate_up, inner = torch.empty_like(gate_up), torch.empty_like(grad)
    grad_weights = None if weights is None else torch.empty_like(weights)
    if P:
        with torch.cuda.device_of(grad):
            _gated_silu_backward[(P,)](
                gate_up,
                grad,
                weights,
                order,
                grad_gate_up,
                grad_weights,
                inner,
                size,
                BLOCK=min(COLUMNS, power_of_two(size)),
            )
    return grad_gate_up, grad_weights, inner


@launch_directly
@jit
def _gated_silu(gate, up, out, gate_stride, up_stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    y = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    y = x * tl.sigmoid(x) * y
    tl.store(out + row * size + column, y.to(out.dtype.element_ty), mask=inside)


@launch_directly
@jit
def _gated_silu_backward(
    gate_up,
    grad,
    weights,
    order,
    grad_gate_up,
    grad_weights,
    inner,
    size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if weights is not None:
        place = tl.load(order + row)
        weight = tl.load(weights + place).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < size
        left = row * 2 * size + column
        gate = tl.load(gate_up + left, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + left + size, mask=inside, other=0.0).to(tl.float32)
        own = tl.load(grad + row * size + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += own * silu * up
        scaled = own * weight
        dtype = grad_gate_up.dtype.element_ty
        grad_gate = scaled * up * sigmoid * (1 + gate * (1 - sigmoid))
        tl.store(grad_gate_up + left, grad_gate.to(dtype), mask=inside)
        tl.store(grad_gate_up + left + size, (scaled * silu).to(dtype), mask=inside)
        product = (silu * up * weight).to(inner.dtype.element_ty)
        tl.store(inner + row * size + column, product, mask=inside)
    if weights is not None:
        result = tl.sum(total, axis=0).to(grad_weights.dtype.element_ty)
        tl.store(grad_weights + place, result)
