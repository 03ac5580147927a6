"""Triton kernels of the decode step for packed weights: both products of experts, each of which is
read once for all rows that chose it. See `packed_kernels.py`.

Shapes: B rows (one token each), D hidden size, I expert width, E experts, W words of a row,
V rows and M columns (pairs of a row and an expert) of a tile.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.expert_kernels import gated, program_expert
from kimi_linear.decode.packed_kernels import product
from kimi_linear.decode.projection_kernels import wait
from kimi_linear.ops.packed.kernels import add_products, block_values, load_scales, load_words
from kimi_linear.ops.runtime import jit, tl


@jit
def _pairs(order, done, stop, M: tl.constexpr):
    """[M]: pairs of a row and an expert, and which of them there are."""
    place = done + tl.arange(0, M)
    there = place < stop
    return tl.load(order + tl.where(there, place, done)), there


@jit
def packed_in_kernel(
    x,  # [B, D], normed
    order,  # int32 [B * TOP] and
    begin,  # int32 [E + 1] and
    active,  # int32 [E + 1], see `group_kernel`
    low,  # [E, 2 * I, W] and
    high,  # of 3 bits [E, 2 * I, W]
    scale,  # int32 [E, words, 2 * I / rows that share one] and
    zero,  # alike
    out,  # [B * TOP, I]
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    FORM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """silu(gate) * up of the rows that chose an expert, a tile of an expert by program."""
    BLOCKS: tl.constexpr = (D + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if FORM[0] == 8 else 32)
    STRIDE: tl.constexpr = (2 * I + FORM[5] - 1) // FORM[5]
    IS_WHOLE: tl.constexpr = BLOCKS * 256 == D
    dtype: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0) * V
    row = tl.minimum(first + tl.arange(0, V), I - 1)
    wait(IS_LINKED)
    expert, start, stop = program_expert(begin, active)
    expert = expert.to(tl.int64)
    low += (expert * 2 * I + row) * WORDS
    high += (expert * 2 * I + row) * WORDS
    up_low, up_high = low + I * WORDS, high + I * WORDS
    scale += expert * SCALE_WORDS * STRIDE
    zero += expert * ZERO_WORDS * STRIDE
    group, up_group = row // FORM[5], (row + I) // FORM[5]
    for done in range(start, stop, M):
        pair, there = _pairs(order, done, stop, M)
        source = x + (pair // TOP).to(tl.int64) * D
        gate = tl.zeros([V, M], tl.float32)
        up = tl.zeros([V, M], tl.float32)
        for block in range(BLOCKS):
            words, upper = load_words(low, high, block, FORM)
            up_words, up_upper = load_words(up_low, up_high, block, FORM)
            scales = load_scales(scale + group, zero + group, block, STRIDE, D, FORM)
            up_scales = load_scales(scale + up_group, zero + up_group, block, STRIDE, D, FORM)
            values = block_values(words, upper, scales, block, FORM, dtype)
            gate = add_products(gate, values, source, block, D, IS_WHOLE)
            values = block_values(up_words, up_upper, up_scales, block, FORM, dtype)
            up = add_products(up, values, source, block, D, IS_WHOLE)
        n = first + tl.arange(0, V)[:, None]
        place = out + pair[None, :].to(tl.int64) * I + n
        tl.store(place, gated(gate, up), mask=(n < I) & there[None, :])


@jit
def packed_out_kernel(
    x,  # [B * TOP, I]
    order,  # int32 [B * TOP] and
    begin,  # int32 [E + 1] and
    active,  # int32 [E + 1], see `group_kernel`
    weights,  # float32 [B * TOP]
    low,  # [E, D, W] and
    high,  # of 3 bits [E, D, W]
    scale,  # int32 [E, words, D / rows that share one] and
    zero,  # alike
    out,  # [B, SLOTS, D], the first TOP of each row
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    FORM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Weighted outputs of the pairs of an expert, a tile of an expert by program."""
    BLOCKS: tl.constexpr = (I + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if FORM[0] == 8 else 32)
    STRIDE: tl.constexpr = (D + FORM[5] - 1) // FORM[5]
    IS_WHOLE: tl.constexpr = BLOCKS * 256 == I
    first = tl.program_id(0) * V
    row = tl.minimum(first + tl.arange(0, V), D - 1)
    wait(IS_LINKED)
    expert, start, stop = program_expert(begin, active)
    expert = expert.to(tl.int64)
    low += (expert * D + row) * WORDS
    high += (expert * D + row) * WORDS
    scale += expert * SCALE_WORDS * STRIDE + row // FORM[5]
    zero += expert * ZERO_WORDS * STRIDE + row // FORM[5]
    for done in range(start, stop, M):
        pair, there = _pairs(order, done, stop, M)
        source = x + pair.to(tl.int64) * I
        y = product(low, high, scale, zero, source, STRIDE, 0, I, BLOCKS, V, M, I, IS_WHOLE, FORM)
        y *= tl.load(weights + pair)[None, :]
        slot = pair // TOP * SLOTS + pair % TOP
        n = first + tl.arange(0, V)[:, None]
        tl.store(out + slot[None, :].to(tl.int64) * D + n, y, mask=(n < D) & there[None, :])
