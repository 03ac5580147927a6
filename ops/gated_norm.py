"""RMS norm over the head, times a sigmoid gate: what stands between KDA and its output projection.

Source: arXiv 2510.26692, section 4 (output gate). Two kernels of ours on CUDA, since FLA's Function
takes the host two to three times as long; FLA's under compilers and on other devices that it knows,
torch elsewhere.

Shapes: H heads, V value size; leading dimensions are free. N rows: all dimensions but V.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_linear.ops.fla.backend import norm_kernel, resolve_backend
from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import (
    ceil_div,
    is_traced,
    jit,
    needs_grad,
    power_of_two,
    spare,
    tl,
    triton,
)

ROWS = 16  # at once
STEPS = 8  # steps of a program of the backward pass, ROWS rows each


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """RMSNorm(x) * weight * sigmoid(gate), computed in float32 (float64 for float64 input).

    Args:
        x: [..., H, V].
        gate: [..., H, V], before the sigmoid.
        weight: [V].
        eps: Added to the mean square.
        backend: "auto", "fla" or "torch".

    Returns:
        [..., H, V] in x's dtype.
    """
    if resolve_backend(x, backend) == "fla":
        if x.is_cuda and triton is not None and not is_traced():
            is_recorded = needs_grad(x, gate, weight)
            launch: Any = _GatedNorm.apply if is_recorded else launch_gated_norm
            return launch(x.contiguous(), gate.contiguous(), weight, eps)
        return norm_kernel()(x, gate, weight, None, activation="sigmoid", eps=eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, out = x.to(wide), torch.sigmoid(gate.to(wide))
    size = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
    scale = torch.rsqrt(size * size / weight.shape[0] + eps)
    for factor in (weight.to(wide), x_wide, scale):
        out = torch.mul(out, factor, out=spare(out))
    return out.to(x.dtype)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return launch_gated_norm(x, gate, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        dx, dgate, dweight = launch_gated_norm_backward(grad.contiguous(), x, gate, weight, ctx.eps)
        return dx, dgate, dweight.to(weight.dtype), None


def launch_gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`gated_rms_norm` of contiguous tensors."""
    out, size = torch.empty_like(x), weight.shape[0]
    num_rows = x.numel() // size
    if num_rows:
        grid = (ceil_div(num_rows, ROWS),)
        with torch.cuda.device_of(x):
            _gated_norm[grid](x, gate, weight, out, num_rows, size, eps, ROWS, power_of_two(size))
    return out


def launch_gated_norm_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and gate, in their shapes and dtypes, and of the weight [V] in float32, from
    that of the output; all contiguous."""
    dx, dgate, size = torch.empty_like(x), torch.empty_like(gate), weight.shape[0]
    num_rows = x.numel() // size
    programs = ceil_div(num_rows, ROWS * STEPS)
    partial = x.new_empty(programs, size, dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(x):
            _gated_norm_backward[(programs,)](
                grad,
                x,
                gate,
                weight,
                dx,
                dgate,
                partial,
                num_rows,
                size,
                eps,
                ROWS,
                STEPS,
                power_of_two(size),
            )
    return dx, dgate, partial.sum(dim=0)


@jit
def _normed(x, place, inside, size, eps):
    """A tile's rows divided by their root mean squares, and the factors that did it."""
    own = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(own * own, axis=1)[:, None] / size + eps)
    return own * scale, scale


@jit
def _opened(gate, place, inside):
    return tl.sigmoid(tl.load(gate + place, mask=inside, other=0.0).to(tl.float32))


@launch_directly
@jit(counts=("num_rows",))
def _gated_norm(x, gate, weight, out, num_rows, size, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < size)
    place = row * size + column
    normed, _ = _normed(x, place, inside, size, eps)
    factor = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    value = normed * factor * _opened(gate, place, inside)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


@launch_directly
@jit(counts=("num_rows",))
def _gated_norm_backward(
    grad,
    x,
    gate,
    weight,
    dx,
    dgate,
    partial,
    num_rows,
    size,
    eps,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)[None, :]
    factor = tl.load(weight + column, mask=column < size, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS * STEPS
    for step in range(STEPS):
        row = (first + step * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (row < num_rows) & (column < size)
        place = row * size + column
        normed, scale = _normed(x, place, inside, size, eps)
        opened = _opened(gate, place, inside)
        slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(slope * opened * normed, axis=0)
        slope *= factor
        of_gate = slope * normed * opened * (1.0 - opened)
        tl.store(dgate + place, of_gate.to(dgate.dtype.element_ty), mask=inside)
        slope *= opened
        mean = tl.sum(slope * normed, axis=1)[:, None] / size
        of_x = scale * (slope - normed * mean)
        tl.store(dx + place, of_x.to(dx.dtype.element_ty), mask=inside)
    own_place = partial + tl.program_id(0) * size + tl.arange(0, BLOCK)
    tl.store(own_place, total, mask=tl.arange(0, BLOCK) < size)
