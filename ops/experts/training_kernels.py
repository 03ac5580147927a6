"""Triton kernels of training: gated SiLU's backward pass, sums of rows, the choice of experts.

Each reads its inputs once and writes its outputs once; beside them, as `reference_...`, is what
they do in torch, which is what runs elsewhere. Sums are in float32, in a fixed order.

Shapes: P pairs of a token and one of its experts, T tokens, E experts, k experts of one token,
D hidden size, I expert width.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

from typing import Any

import torch
from kimi_linear.ops.experts.prefill_kernels import choose_experts
from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import has_kernels
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# ------------------------------------------------------------------------------------ sums of rows
def reference_sum_of_rows(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """[T, D]: of each token the rows at its `places`, weighted if there are weights, summed.

    Args:
        rows: [P, D].
        places: [T, k] int64, rows' numbers.
        weights: [T, k], or None.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    picked = rows[places].to(wide)
    if weights is not None:
        picked = picked * weights[..., None]
    return picked.sum(dim=1).to(rows.dtype)


def sum_of_rows(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """The same, one program a token."""
    if not has_kernels(rows, *([] if weights is None else [weights])):
        return reference_sum_of_rows(rows, places, weights)
    return launch_sum_of_rows(rows, places, weights)


def launch_sum_of_rows(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    (T, k), D = places.shape, rows.shape[1]
    out = rows.new_empty(T, D)
    if T:
        with torch.cuda.device_of(rows):
            _sum_of_rows[(T,)](
                rows,
                places,
                places if weights is None else weights,
                out,
                D,
                NUM=k,
                IS_WEIGHTED=weights is not None,
                BLOCK=triton.next_power_of_2(D),
                num_warps=8,
            )
    return out


# -------------------------------------------------------------------------------- choice of experts
def choose_experts_in_training(
    logits: Tensor, bias: Tensor, num_chosen: int, renormalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """`choose_experts`, the kernel of inference, with a gradient for the logits [T, E]."""
    return _ChooseExperts.apply(logits, bias, num_chosen, renormalize, factor)


class _ChooseExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor, num_chosen: int, renormalize: bool, factor: float
    ) -> tuple[Tensor, Tensor]:
        weights, experts = choose_experts(logits, bias, num_chosen, renormalize, factor)
        ctx.save_for_backward(logits, experts)
        ctx.renormalize, ctx.factor = renormalize and num_chosen > 1, factor
        ctx.mark_non_differentiable(experts)
        return weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        return launch_choice_backward(
            logits, experts, grad.contiguous(), ctx.renormalize, ctx.factor
        ), *(4 * [None])


def reference_choice_backward(
    logits: Tensor, experts: Tensor, grad: Tensor, renormalize: bool, factor: float
) -> Tensor:
    """The gradient of logits [T, E], of that of the weights of the chosen experts.

    Args:
        logits: [T, E].
        experts: [T, k] int64, all different in a row.
        grad: [T, k], of sigmoid(logits) at the experts, divided by their sum if they are
            renormalised, times `factor`.
    """
    scores = logits.sigmoid().gather(1, experts)
    grad = grad * factor
    if renormalize:
        total = scores.sum(dim=-1, keepdim=True) + 1e-20
        grad = (grad - (grad * scores).sum(dim=-1, keepdim=True) / total) / total
    return torch.zeros_like(logits).scatter(1, experts, grad * scores * (1 - scores))


def launch_choice_backward(
    logits: Tensor, experts: Tensor, grad: Tensor, renormalize: bool, factor: float
) -> Tensor:
    """The same, eight tokens a program."""
    (T, E), k = logits.shape, experts.shape[1]
    out, rows = torch.empty_like(logits), 8
    if T:
        with torch.cuda.device_of(logits):
            _choice_backward[(triton.cdiv(T, rows),)](
                logits,
                experts,
                grad,
                out,
                T,
                E,
                factor,
                NUM=k,
                NUM_BLOCK=triton.next_power_of_2(k),
                RENORMALIZE=renormalize,
                ROWS=rows,
                BLOCK=triton.next_power_of_2(E),
            )
    return out


# ----------------------------------------------------------------------------------------- kernels
if triton is not None:

    @launch_directly
    @triton.jit
    def _choice_backward(
        logits,
        experts,
        grad,
        out,
        num_tokens,
        num_experts,
        factor,
        NUM: tl.constexpr,
        NUM_BLOCK: tl.constexpr,
        RENORMALIZE: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        slot = tl.arange(0, NUM_BLOCK)[None, :]
        real = (token < num_tokens)[:, None]
        pair = token[:, None] * NUM + slot
        chosen = real & (slot < NUM)
        expert = tl.load(experts + pair, mask=chosen, other=0)
        own = tl.load(grad + pair, mask=chosen, other=0.0).to(tl.float32) * factor
        score = tl.load(logits + token[:, None] * num_experts + expert, mask=chosen, other=0.0)
        score = tl.where(chosen, tl.sigmoid(score.to(tl.float32)), 0.0)
        if RENORMALIZE:
            total = tl.sum(score, axis=1)[:, None] + 1e-20
            own = (own - tl.sum(own * score, axis=1)[:, None] / total) / total
        own = own * score * (1 - score)
        column = tl.arange(0, BLOCK)[None, :]
        row = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for number in tl.static_range(NUM):
            is_slot = slot == number
            at = tl.sum(tl.where(is_slot, expert, 0), axis=1)[:, None]
            value = tl.sum(tl.where(is_slot, own, 0.0), axis=1)[:, None]
            row += tl.where(column == at, value, 0.0)
        place = out + token[:, None] * num_experts + column
        tl.store(place, row.to(out.dtype.element_ty), mask=real & (column < num_experts))

    @launch_directly
    @triton.jit
    def _sum_of_rows(
        rows,
        places,
        weights,
        out,
        size,
        NUM: tl.constexpr,
        IS_WEIGHTED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for slot in tl.static_range(NUM):
            place = tl.load(places + token * NUM + slot)
            row = tl.load(rows + place * size + column, mask=column < size, other=0.0)
            row = row.to(tl.float32)
            if IS_WEIGHTED:
                row *= tl.load(weights + token * NUM + slot).to(tl.float32)
            total += row
        tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=column < size)


__all__ = [
    "choose_experts_in_training",
    "launch_choice_backward",
    "launch_sum_of_rows",
    "reference_choice_backward",
    "reference_sum_of_rows",
    "sum_of_rows",
]
