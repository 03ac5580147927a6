"""Triton kernels of packed experts for many tokens: both products, which take words apart tile by
tile.

As those of `prefill_kernels.py`, whose way to find a tile's expert they share, but weights are
the left operand, in registers, and tokens the right one. They need no instruction of Hopper's.

Shapes: T tokens, D hidden size, I expert width, E experts, k experts of one token, P = T * k pairs
of a token and one of its experts, sorted by expert, W words of a row.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.experts.tiles import find_tile, tiles_of
from kimi_linear.ops.launch import driver, launch_directly
from kimi_linear.ops.packed.kernels import add_products, block_values, load_scales, load_words
from kimi_linear.ops.packed.unpacking import form, planes, words_by_matrix
from kimi_linear.ops.runtime import ceil_div, jit, tl

# outputs and rows of a tile, warps and stages; the large ones are for Hopper's registers
TILE, HOPPER_TILE, HOPPER_LARGE_TILE = (64, 32, 4, 2), (64, 64, 4, 2), (128, 64, 4, 2)
HOPPER = 90


def gate_up(x: Tensor, order: Tensor, ends: Tensor, weight: Any, k: int) -> Tensor:
    """[P, I], by expert: silu(gate) * up of the tokens' rows x [T, D], for weight [E, 2 I, D].
    Rows with an out-of-range expert are left uninitialised."""
    E, width, D = weight.shape
    out = x.new_empty(order.numel(), width // 2)
    # both halves' sums take registers; what is taken apart in more steps leaves fewer of them
    is_simple = weight.scheme.bits == 4 and weight.zero is None
    outputs, rows, num_warps, num_stages = _tile(weight, _packed_gate_up, is_simple)
    grid = (tiles_of(order.numel(), E, rows), ceil_div(width // 2, outputs))
    with torch.cuda.device_of(x):
        _packed_gate_up[grid](
            x,
            order,
            ends,
            *planes(weight),
            out,
            TOP=k,
            D=D,
            I=width // 2,
            **_sizes(weight, outputs, rows, _packed_gate_up),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out


def down(inner: Tensor, order: Tensor, ends: Tensor, weight: Any) -> Tensor:
    """[P, D], in the pairs' order, from inner [P, I] by expert and weight [E, D, I].
    Rows with an out-of-range expert are left uninitialised."""
    E, D, width = weight.shape
    out = inner.new_empty(order.numel(), D)
    outputs, rows, num_warps, num_stages = _tile(weight, _packed_down, True)
    grid = (tiles_of(order.numel(), E, rows), ceil_div(D, outputs))
    with torch.cuda.device_of(inner):
        _packed_down[grid](
            inner,
            order,
            ends,
            *planes(weight),
            out,
            D=D,
            I=width,
            **_sizes(weight, outputs, rows, _packed_down),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out


def _tile(weight: Any, kernel: Any, is_large: bool) -> tuple[int, int, int, int]:
    """The tile for the GPU that a kernel is compiled for."""
    is_compiled = form(weight, kernel)[6]
    if not is_compiled or driver.active.get_current_target().arch != HOPPER:
        return TILE
    return HOPPER_LARGE_TILE if is_large else HOPPER_TILE


def _sizes(weight: Any, outputs: int, rows: int, kernel: Any) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "E": weight.shape[0],
        "EXPERTS": max(16, 1 << (weight.shape[0] - 1).bit_length()),
        **words_by_matrix(weight),
        "OUTPUTS": outputs,
        "ROWS": rows,
        "FORM": form(weight, kernel),
    }


@launch_directly
@jit
def _packed_gate_up(
    x,  # [T, D]
    order,  # [P]
    ends,  # [E]
    low,  # [E, 2 * I, W] and
    high,  # of 3 bits [E, 2 * I, W]
    scale,  # int32 [E, words, 2 * I / rows that share one] and
    zero,  # alike
    out,  # [P, I]
    TOP: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
):
    BLOCKS: tl.constexpr = (D + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if FORM[0] == 8 else 32)
    STRIDE: tl.constexpr = (2 * I + FORM[5] - 1) // FORM[5]
    dtype: tl.constexpr = x.dtype.element_ty
    expert, first, end = find_tile(ends, tl.program_id(0), E, EXPERTS, ROWS)
    if expert >= E:
        return
    row = first + tl.arange(0, ROWS)
    tokens = x + tl.load(order + tl.minimum(row, end - 1)) // TOP * D
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    gate_row = tl.minimum(n, I - 1)
    expert = expert.to(tl.int64)
    place = (expert * 2 * I + gate_row) * WORDS
    scale += expert * SCALE_WORDS * STRIDE
    zero += expert * ZERO_WORDS * STRIDE
    gate_group, up_group = gate_row // FORM[5], (gate_row + I) // FORM[5]
    gate = tl.zeros([OUTPUTS, ROWS], tl.float32)
    up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for block in range(BLOCKS):
        words, upper = load_words(low + place, high + place, block, FORM)
        scales = load_scales(scale + gate_group, zero + gate_group, block, STRIDE, D, FORM)
        values = block_values(words, upper, scales, block, FORM, dtype)
        gate = add_products(gate, values, tokens, block, D, D % 256 == 0)
        words, upper = load_words(low + place + I * WORDS, high + place + I * WORDS, block, FORM)
        scales = load_scales(scale + up_group, zero + up_group, block, STRIDE, D, FORM)
        values = block_values(words, upper, scales, block, FORM, dtype)
        up = add_products(up, values, tokens, block, D, D % 256 == 0)
    y = gate * tl.sigmoid(gate) * up
    target = out + row[None, :].to(tl.int64) * I + n[:, None]
    tl.store(target, y, mask=(row < end)[None, :] & (n < I)[:, None])


@launch_directly
@jit
def _packed_down(
    inner,  # [P, I]
    order,  # [P]
    ends,  # [E]
    low,  # [E, D, W] and
    high,  # of 3 bits [E, D, W]
    scale,  # int32 [E, words, D / rows that share one] and
    zero,  # alike
    out,  # [P, D]
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    FORM: tl.constexpr,
):
    BLOCKS: tl.constexpr = (I + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if FORM[0] == 8 else 32)
    STRIDE: tl.constexpr = (D + FORM[5] - 1) // FORM[5]
    expert, first, end = find_tile(ends, tl.program_id(0), E, EXPERTS, ROWS)
    if expert >= E:
        return
    row = first + tl.arange(0, ROWS)
    rows = inner + tl.minimum(row, end - 1).to(tl.int64) * I
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    own = tl.minimum(n, D - 1)
    expert = expert.to(tl.int64)
    place = (expert * D + own) * WORDS
    scale += expert * SCALE_WORDS * STRIDE + own // FORM[5]
    zero += expert * ZERO_WORDS * STRIDE + own // FORM[5]
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for block in range(BLOCKS):
        words, upper = load_words(low + place, high + place, block, FORM)
        scales = load_scales(scale, zero, block, STRIDE, I, FORM)
        values = block_values(words, upper, scales, block, FORM, inner.dtype.element_ty)
        total = add_products(total, values, rows, block, I, I % 256 == 0)
    pair = tl.load(order + tl.minimum(row, end - 1))
    target = out + pair[None, :].to(tl.int64) * D + n[:, None]
    tl.store(target, total, mask=(row < end)[None, :] & (n < D)[:, None])
