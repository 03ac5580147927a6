"""Training on a GPU: a KDA layer's projections as one product, and the convolutions behind it.

Shapes: B batch, T tokens, M = B T, D hidden size, H heads, K head size, W taps, N rows of all
matrices.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_linear.ops.joint_products import split_gradient, stacked
from kimi_linear.ops.runtime import no_autocast, product_dtype
from kimi_linear.ops.short_conv.training_kernels import (
    WIDTH,
    convolve_columns,
    convolve_columns_backward,
)


def project_jointly(
    x: Tensor,
    weights: Sequence[Tensor],
    taps: Sequence[Tensor],
    starts: Tensor | None,
    head_dim: int,
) -> tuple[Tensor, ...]:
    """Products of one input; three of them convolved, with SiLU, and two of these normalised.

    Args:
        x: [B, T, D].
        weights: of the projections of q, k, v and any others, [., D].
        taps: of the convolutions of q, k and v, [H * K, 1, W], W <= 4, oldest first.
        starts: [T] int32, the first token of each token's sequence; None for plain rows.
        head_dim: K.

    Returns:
        q, k, v [B, T, H * K] after convolution and SiLU, q and k with an L2 norm of 1 by head; and
        the others' products [B, T, .].
    """
    dtype = product_dtype(weights[0])
    return _JointProjections.apply(x, starts, dtype, len(weights), head_dim, *weights, *taps)


class _JointProjections(torch.autograd.Function):
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
            y = F.linear(x.to(dtype), stacked(matrices, dtype)).flatten(0, 1)
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
                dx = (dy @ stacked(matrices, ctx.dtype)).to(x.dtype).view_as(x)
            if any(ctx.needs_input_grad[5 : 5 + ctx.num]):
                dmatrices = split_gradient(dy.t() @ x.flatten(0, 1).to(ctx.dtype), matrices)
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
