"""Triton kernels of the choice of experts and of its backward pass.

Each reads its inputs once and writes its outputs once. Sums are in float32, in a fixed order.

Shapes: T tokens, E experts, k experts of one token.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

import torch
from torch import Tensor

from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import ceil_div, jit, power_of_two, tl

ROWS = 8  # tokens of a program


def launch_choice(
    logits: Tensor, bias: Tensor, num_chosen: int, renormalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """`choose_experts` by sigmoid and without groups; of equal scores the lower number is chosen.

    Args:
        logits: [T, E] float32.
        bias: [E].
        renormalize: divide the weights by their sum.
    """
    T, E = logits.shape
    weights = logits.new_empty(T, num_chosen)
    experts = torch.empty(T, num_chosen, dtype=torch.int64, device=logits.device)
    if T:
        with torch.cuda.device_of(logits):
            _choose_experts[(ceil_div(T, ROWS),)](
                logits,
                bias,
                weights,
                experts,
                T,
                E,
                factor,
                NUM=num_chosen,
                NUM_BLOCK=power_of_two(num_chosen),
                RENORMALIZE=renormalize,
                ROWS=ROWS,
                BLOCK=power_of_two(E),
            )
    return weights, experts


def launch_choice_backward(
    logits: Tensor, experts: Tensor, grad: Tensor, renormalize: bool, factor: float
) -> Tensor:
    """The gradient of logits [T, E], from that of the weights.

    Args:
        logits: [T, E].
        experts: [T, k] int64, all different in a row.
        grad: [T, k], of sigmoid(logits) at the experts, divided by their sum if they are
            renormalised, times `factor`.
    """
    (T, E), k = logits.shape, experts.shape[1]
    out = torch.empty_like(logits)
    if T:
        with torch.cuda.device_of(logits):
            _choice_backward[(ceil_div(T, ROWS),)](
                logits,
                experts,
                grad,
                out,
                T,
                E,
                factor,
                NUM=k,
                NUM_BLOCK=power_of_two(k),
                RENORMALIZE=renormalize,
                ROWS=ROWS,
                BLOCK=power_of_two(E),
            )
    return out


@launch_directly
@jit(counts=("num_tokens",))
def _choose_experts(
    logits,
    bias,
    weights,
    experts,
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
    expert = tl.arange(0, BLOCK)
    slot = tl.arange(0, NUM_BLOCK)
    real = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
    score = tl.load(logits + token[:, None] * num_experts + expert[None, :], mask=real, other=0)
    score = tl.sigmoid(score.to(tl.float32))
    moved = score + tl.load(bias + expert, mask=expert < num_experts, other=0)[None, :]
    moved = tl.where(expert[None, :] < num_experts, moved, float("-inf"))
    chosen = tl.zeros((ROWS, NUM_BLOCK), dtype=tl.int32)
    weight = tl.zeros((ROWS, NUM_BLOCK), dtype=tl.float32)
    for i in range(NUM):
        best = tl.argmax(moved, axis=1)
        is_best = expert[None, :] == best[:, None]
        here = slot[None, :] == i
        chosen = tl.where(here, best[:, None], chosen)
        own = tl.sum(tl.where(is_best, score, 0.0), axis=1)
        weight = tl.where(here, own[:, None], weight)
        moved = tl.where(is_best, float("-inf"), moved)
    if RENORMALIZE:
        weight = weight / (tl.sum(weight, axis=1)[:, None] + 1e-20)
    chosen = tl.minimum(tl.maximum(chosen, 0), num_experts - 1)  # also where logits are NaN
    place = token[:, None] * NUM + slot[None, :]
    inside = (token < num_tokens)[:, None] & (slot < NUM)[None, :]
    tl.store(weights + place, weight * factor, mask=inside)
    tl.store(experts + place, chosen.to(tl.int64), mask=inside)


@launch_directly
@jit(counts=("num_tokens",))
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
