"""Products of one input taken at once, in training on a GPU.

A KDA layer multiplies its input by six matrices and an MLP by two. One at a time, with autograd,
that is a launch each, three in the backward pass and a sum: at some thousand tokens the host takes
longer to launch them than the GPU to run them. Here the matrices are put together, one product is
taken, and what follows (three convolutions, the gated SiLU) reads it where it lies. Weights stay
parameters of their own, and nothing but the product is kept.

Shapes: B batch, T tokens, M = B T, D hidden size, H heads, K key size, I width of an MLP, N rows of
all matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from kimi_linear.inputs.layout import SequenceLayout
from kimi_linear.ops.experts.training import product_dtype
from kimi_linear.ops.experts.training_kernels import gated_silu, weighted_silu_backward
from kimi_linear.ops.runtime import HOOKS, is_traced, no_autocast
from kimi_linear.ops.short_conv.training_kernels import (
    WIDTH,
    convolve_columns,
    convolve_columns_backward,
    triton,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DEVICES = ("cuda",)  # where it is used
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def trains_jointly(x: Tensor, linears: Sequence[nn.Linear], *others: Tensor) -> bool:
    """Whether these linear layers are taken at once: in training, if nothing but their weights
    counts (no adapters, hooks, quantised or sharded weights)."""
    if triton is None or x.device.type not in DEVICES or is_traced():
        return False
    # in the first pass of reentrant checkpointing too, which records no gradients
    if not (torch.is_grad_enabled() or linears[0].training) or x.dtype not in DTYPES:
        return False
    dtype: torch.dtype | None = None
    device, wants = x.device, x.requires_grad
    for linear in linears:
        if type(linear) is not nn.Linear or linear._parameters["bias"] is not None:
            return False
        if any(linear.__dict__[hooks] for hooks in HOOKS):
            return False
        weight = linear.weight
        if type(weight) not in (nn.Parameter, Tensor) or weight.dim() != 2:  # not gathered yet
            return False
        dtype = dtype or weight.dtype
        if weight.dtype != dtype or weight.device != device:
            return False
        wants = wants or weight.requires_grad
    return dtype in DTYPES and (wants or any(other.requires_grad for other in others))


def _joint(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[N, D]: the matrices one below the other."""
    return torch.cat(list(matrices)).to(dtype)


def _split(grad: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the matrices, of that of the joint one."""
    parts = grad.split([matrix.shape[0] for matrix in matrices])
    return [part.to(matrix.dtype) for part, matrix in zip(parts, matrices, strict=True)]


# ---------------------------------------------------------------------------------------- KDA layer
def project_kda(
    x: Tensor,
    linears: Sequence[nn.Linear],
    taps: Sequence[Tensor],
    layout: SequenceLayout,
    head_dim: int,
) -> tuple[Tensor, ...]:
    """Products of one input; three of them convolved, with SiLU, and two of these normalised.

    Args:
        x: [B, T, D], packed sequences or plain rows as `layout` says.
        linears: those of q, k, v, and any others.
        taps: of the convolutions of q, k and v, [H * K, 1, W], W <= 4, oldest first.
        layout: where sequences begin.
        head_dim: K.

    Returns:
        q, k, v [B, T, H * K] after convolution and SiLU, q and k with an L2 norm of 1 by head; and
        the others' products [B, T, .].
    """
    weights = [linear.weight for linear in linears]
    starts, dtype = layout.token_starts, product_dtype(x, weights[0])
    return _ProjectKDA.apply(x, starts, dtype, len(weights), head_dim, *weights, *taps)


class _ProjectKDA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        starts: Tensor | None,
        dtype: torch.dtype,
        num: int,
        head_dim: int,
        *both: Tensor,
    ) -> tuple[Tensor, ...]:
        matrices, (B, T, _) = both[:num], x.shape
        with no_autocast(x.device):
            y = F.linear(x.to(dtype), _joint(matrices, dtype)).flatten(0, 1)
            taps = _joint_taps(both[num:], dtype)
            convolved = convolve_columns(y, taps, starts, T, head_dim)
        ctx.save_for_backward(x, y, starts, *both)
        ctx.dtype, ctx.num, ctx.head_dim = dtype, num, head_dim
        others = y.split([matrix.shape[0] for matrix in matrices], dim=1)[3:]
        return tuple(out.view(B, T, -1) for out in (*convolved, *others))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, starts, *both = ctx.saved_tensors
        matrices, taps = both[: ctx.num], both[ctx.num :]
        flat = [grad.flatten(0, 1).contiguous() for grad in grads]
        dx: Tensor | None = None
        dmatrices: Sequence[Tensor | None] = [None] * len(matrices)
        with no_autocast(x.device):
            dy = torch.empty_like(y)
            joint_taps = _joint_taps(taps, ctx.dtype)
            dtaps = convolve_columns_backward(
                flat[:3], y, joint_taps, starts, x.shape[1], ctx.head_dim, dy
            )
            torch.cat(flat[3:], dim=1, out=dy[:, 3 * taps[0].shape[0] :])
            if ctx.needs_input_grad[0]:
                dx = (dy @ _joint(matrices, ctx.dtype)).to(x.dtype).view_as(x)
            if any(ctx.needs_input_grad[5 : 5 + ctx.num]):
                dmatrices = _split(dy.t() @ x.flatten(0, 1).to(ctx.dtype), matrices)
            if all(tap.dtype == ctx.dtype for tap in taps):
                dtaps = dtaps.to(ctx.dtype)
            parts = [
                part[:, WIDTH - tap.shape[2] :].to(tap.dtype).view_as(tap)
                for part, tap in zip(dtaps.unbind(), taps, strict=True)
            ]
        return dx, *(4 * [None]), *dmatrices, *parts


def _joint_taps(taps: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[3, H * K, 4], zeros in front."""
    joint = torch.cat(list(taps)).view(len(taps), *taps[0].shape[::2]).to(dtype)
    missing = WIDTH - joint.shape[2]
    return F.pad(joint, (missing, 0)) if missing else joint


# ---------------------------------------------------------------------------------------------- MLP
def gated_mlp(x: Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> Tensor:
    """down(silu(gate(x)) * up(x)) for x [.., D]; only the product of gate and up is kept."""
    weights = [linear.weight for linear in (gate, up, down)]
    return _GatedMLP.apply(x, *weights, product_dtype(x, weights[0]))


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype
    ) -> Tensor:
        with no_autocast(x.device):
            rows = x.flatten(0, -2).to(dtype)
            gate_up = F.linear(rows, _joint((gate, up), dtype))
            out = F.linear(gated_silu(gate_up), down.to(dtype))
        ctx.save_for_backward(x, gate_up, gate, up, down)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, gate, up, down = ctx.saved_tensors
        dtype, wants = gate_up.dtype, ctx.needs_input_grad
        dx = dgate = dup = ddown = None
        with no_autocast(x.device):
            rows = grad.flatten(0, -2).to(dtype)
            dgate_up, _, inner = weighted_silu_backward(gate_up, rows @ down.to(dtype))
            if wants[3]:
                ddown = (rows.t() @ inner).to(down.dtype)
            if wants[0]:
                dx = (dgate_up @ _joint((gate, up), dtype)).to(x.dtype).view_as(x)
            if wants[1] or wants[2]:
                dgate, dup = _split(dgate_up.t() @ x.flatten(0, -2).to(dtype), (gate, up))
        return dx, dgate, dup, ddown, None


__all__ = ["gated_mlp", "project_kda", "trains_jointly"]
