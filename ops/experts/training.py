"""Routed experts in training: what the backward pass needs is what the first product made.

Of a pair of a token and one of its experts, autograd through Transformers' "grouped_mm" keeps the
token's hidden state, gate and up, silu(gate), the product, the second product's output and that
times its weight in float32. Here only gate and up are kept. The rest is made again in the backward
pass, which costs copies but no product of matrices: the gradient of a pair's weight is

    d w = d out . (W_down inner) = (W_down^T d out) . inner

whose first factor is needed anyway (as SonicMoE does it, arXiv 2512.14080).

Shapes: T tokens, D hidden size, I expert width, E experts, k experts of one token, P = T * k pairs
in the order of their experts.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kimi_linear.ops.experts.row_sums import sum_of_rows
from kimi_linear.ops.experts.sort import sort_pairs
from kimi_linear.ops.gated_silu import gated_silu, gated_silu_backward
from kimi_linear.ops.quantized import QuantizedTensor, plain_weights
from kimi_linear.ops.runtime import is_plain_silu, is_traced, no_autocast, product_dtype

# Where it is used.
DEVICES = ("cpu", "cuda")


def grouped_mm() -> Callable[..., Tensor] | None:
    """torch's products by group, under whichever name this torch has them."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def trains_lean(experts: Any, x: Tensor, weights: Tensor) -> bool:
    """Whether `train_experts` takes this call."""
    matrices = experts.gate_up_proj, experts.down_proj
    if x.device.type not in DEVICES or is_traced():
        return False
    # in the first pass of reentrant checkpointing too, which records no gradients
    if not (experts.training or torch.is_grad_enabled()):
        return False
    if not any(each.requires_grad for each in (x, weights, *matrices)):
        return False
    return (
        is_plain_silu(experts.act_fn)
        and matrices[0].shape[0] == experts.config.num_experts  # no expert parallelism
        and all(
            type(each) in (nn.Parameter, Tensor) or isinstance(each, QuantizedTensor)
            for each in matrices
        )
        and all(each.device == x.device and each.dtype == matrices[0].dtype for each in matrices)
        and weights.dtype == torch.promote_types(x.dtype, torch.float32)
        and _has_products(x, *matrices)
    )


def _has_products(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """On a CPU, of any dtype; on a GPU, what torch's grouped products take."""
    if x.device.type == "cpu":
        return True
    if not x.is_cuda or grouped_mm() is None or product_dtype(gate_up) != torch.bfloat16:
        return False
    capability = torch.cuda.get_device_capability(x.device)
    is_able = capability >= (8, 0) if hasattr(F, "grouped_mm") else capability[0] == 9
    is_aligned = gate_up.is_contiguous() and down.is_contiguous()
    return is_able and is_aligned and gate_up.shape[2] % 8 == down.shape[2] % 8 == 0


def train_experts(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """[T, D], experts and weights [T, k] to [T, D]."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    return _Experts.apply(x, weights, gate_up, down, index, product_dtype(gate_up))


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_Tk: Tensor,
        gate_up_EID: Tensor,
        down_EDI: Tensor,
        index_Tk: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        with no_autocast(x_TD.device):
            order, ends, tokens, places = sort_pairs(index_Tk, gate_up_EID.shape[0])
            gate_up = _products(x_TD.to(dtype)[tokens], plain_weights(gate_up_EID, dtype).mT, ends)
            pairs = _products(
                gated_silu(*gate_up.chunk(2, dim=1)), plain_weights(down_EDI, dtype).mT, ends
            )
            out = sum_of_rows(pairs, places, weights_Tk)
        ctx.save_for_backward(
            x_TD, weights_Tk, gate_up_EID, down_EDI, gate_up, tokens, order, places, ends
        )
        ctx.dtype = dtype
        return out.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights, gate_up_EID, down_EDI, gate_up, tokens, order, places, ends = (
            ctx.saved_tensors
        )
        dtype, wants = ctx.dtype, ctx.needs_input_grad
        dx = dgate_up_EID = ddown_EDI = None
        with no_autocast(grad_TD.device):
            grad = grad_TD.to(dtype)[tokens]
            dinner = _products(grad, plain_weights(down_EDI, dtype), ends)
            dgate_up, dweights, inner = gated_silu_backward(gate_up, dinner, weights, order)
            del dinner
            if wants[3]:
                ddown_EDI = _outer_products(grad, inner, ends).to(down_EDI.dtype)
            del grad, inner
            if wants[2]:
                pairs = x_TD.to(dtype)[tokens]
                dgate_up_EID = _outer_products(dgate_up, pairs, ends).to(gate_up_EID.dtype)
                del pairs
            if wants[0]:
                pairs = _products(dgate_up, plain_weights(gate_up_EID, dtype), ends)
                dx = sum_of_rows(pairs, places).to(x_TD.dtype)
        return dx, dweights, dgate_up_EID, ddown_EDI, None, None


def _products(rows_PM: Tensor, matrices_EMN: Tensor, ends: Tensor) -> Tensor:
    """[P, N]: each expert's rows by its matrix."""
    if rows_PM.is_cuda:
        product = grouped_mm()
        assert product is not None
        return product(rows_PM, matrices_EMN, offs=ends)
    out = rows_PM.new_empty(rows_PM.shape[0], matrices_EMN.shape[2])
    for expert, (start, stop) in enumerate(pairwise([0, *ends.tolist()])):
        torch.mm(rows_PM[start:stop], matrices_EMN[expert], out=out[start:stop])
    return out


def _outer_products(left_PM: Tensor, right_PN: Tensor, ends: Tensor) -> Tensor:
    """[E, M, N]: the sum over each expert's rows of left times right."""
    if left_PM.is_cuda:
        product = grouped_mm()
        assert product is not None
        return product(left_PM.t(), right_PN, offs=ends)
    out = left_PM.new_empty(ends.numel(), left_PM.shape[1], right_PN.shape[1])
    for expert, (start, stop) in enumerate(pairwise([0, *ends.tolist()])):
        torch.mm(left_PM[start:stop].t(), right_PN[start:stop], out=out[expert])
    return out
