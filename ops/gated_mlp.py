"""The gated MLP: down(act(gate(x)) * up(x)).

Shapes: T tokens, D hidden size, I width of the MLP.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kimi_linear.ops.gated_silu import gated_silu, gated_silu_backward, launch_gated_silu
from kimi_linear.ops.joint_products import joint_weights, split_gradient, stacked
from kimi_linear.ops.projections import LinearInput, project
from kimi_linear.ops.runtime import (
    has_kernels,
    in_pieces,
    is_plain_silu,
    no_autocast,
    product_dtype,
)

# Tokens read at once where no graph is recorded.
PIECE_TOKENS = 32768


def gated_mlp(
    x: Tensor, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module
) -> Tensor:
    """Gated MLP of x [.., D], in pieces of tokens where no graph is recorded.

    Args:
        x: [.., D].
        gate_proj, up_proj: linear layers from D to I.
        down_proj: linear layer from I to D.
        act_fn: activation of the gate.

    Returns:
        [.., D].
    """

    def run(x: Tensor) -> Tensor:
        weights = joint_weights(x, (gate_proj, up_proj, down_proj))
        if weights is not None and is_plain_silu(act_fn):
            return _JointMLP.apply(x, *weights, product_dtype(weights[0]))
        read = LinearInput(x)
        gate, up = read.through(gate_proj), read.through(up_proj)
        if has_kernels(gate, up) and is_plain_silu(act_fn):
            inner = launch_gated_silu(gate.flatten(0, -2), up.flatten(0, -2)).view_as(up)
        else:
            inner = act_fn(gate) * up
        return project(inner, down_proj)

    return in_pieces(run, PIECE_TOKENS, x)


class _JointMLP(torch.autograd.Function):
    """Training on a GPU: gate and up as one product, and nothing but that product is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, dtype: torch.dtype
    ) -> Tensor:
        with no_autocast(x.device):
            rows = x.flatten(0, -2).to(dtype)
            gate_up = F.linear(rows, stacked((gate, up), dtype))
            out = F.linear(gated_silu(*gate_up.chunk(2, dim=1)), down.to(dtype))
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
            dgate_up, _, inner = gated_silu_backward(gate_up, rows @ down.to(dtype))
            if wants[3]:
                ddown = (rows.t() @ inner).to(down.dtype)
            if wants[0]:
                dx = (dgate_up @ stacked((gate, up), dtype)).to(x.dtype).view_as(x)
            if wants[1] or wants[2]:
                dgate_up_ND = dgate_up.t() @ x.flatten(0, -2).to(dtype)
                dgate, dup = split_gradient(dgate_up_ND, (gate, up))
        return dx, dgate, dup, ddown, None
