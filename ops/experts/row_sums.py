"""Sums of the rows that a token's experts made, in torch and as Triton kernels, a program a token.

Each reads its inputs once and writes its outputs once. Sums are in float32, in a fixed order.

Shapes: T tokens, D hidden size, k experts of one token, P = T * k pairs of a token and one of its
experts.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

import torch
from torch import Tensor

from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import has_kernels, jit, power_of_two, tl


# ------------------------------------------------------------------------- rows in pairs' order
def weighted_sum(pairs: Tensor, weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """[T, D]: of each token its pairs' rows, weighted and summed.

    Rows of experts of number `num_experts` or more, other ranks', do not count and are not read.

    Args:
        pairs: [P, D], in the order of the tokens.
        weights: [T, k].
        experts: [T, k] int64.
    """
    (T, k), D = weights.shape, pairs.shape[1]
    out = pairs.new_empty(T, D)
    if T:
        block = power_of_two(D)
        with torch.cuda.device_of(pairs):
            _weighted_sum[(T,)](
                pairs, weights, experts, out, D, num_experts, NUM=k, BLOCK=block, num_warps=8
            )
    return out


# ---------------------------------------------------------------------- rows in experts' order
def sum_of_rows(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """[T, D]: of each token the rows at its `places`, weighted if there are weights, summed.

    Args:
        rows: [P, D].
        places: [T, k] int64, rows' numbers.
        weights: [T, k], or None.
    """
    if has_kernels(rows, *([] if weights is None else [weights])):
        return launch_sum_of_rows(rows, places, weights)
    return reference_sum_of_rows(rows, places, weights)


def reference_sum_of_rows(rows: Tensor, places: Tensor, weights: Tensor | None) -> Tensor:
    """`sum_of_rows` in torch."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    picked = rows[places].to(wide)
    if weights is not None:
        picked = picked * weights[..., None]
    return picked.sum(dim=1).to(rows.dtype)


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
                BLOCK=power_of_two(D),
                num_warps=8,
            )
    return out


# --------------------------------------------------------------------------------------- kernels
@launch_directly
@jit
def _weighted_sum(
    pairs, weights, experts, out, size, num_experts, NUM: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(NUM):
        pair = token * NUM + slot
        weight = tl.load(weights + pair).to(tl.float32)
        length = tl.where(tl.load(experts + pair) < num_experts, size, 0)
        values = tl.load(pairs + pair * size + column, mask=column < length, other=0.0)
        total += weight * values.to(tl.float32)
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=column < size)


@launch_directly
@jit
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
