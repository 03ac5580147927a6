"""Triton kernels of the decode step of few rows: both products of packed experts, whose inputs and
inner activations are in fixed point. See `fixed_product_kernels.py`.

The shared experts come with the others: a launch of their own would take as long.

Shapes: B rows (one token each), D hidden size, E experts, I expert width, P inputs in whole blocks
of 256, R = P / 32, W words of a row; of a tile V weights' rows and T tokens.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.expert_kernels import gated
from kimi_linear.decode.fixed_point_kernels import largest, store_fixed_point
from kimi_linear.decode.fixed_product_kernels import first_reads, fixed_product
from kimi_linear.decode.projection_kernels import wait, wait_first
from kimi_linear.ops.runtime import jit, tl


@jit
def _store_gated(
    y,  # float32 [V, T], gate and up in turn
    first,  # output
    stop,  # the one behind the last
    out,  # [.., N] in fixed point, see `fixed_product`
    row,  # the first token's
    num_tokens,
    N: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
):
    """silu(gate) * up, written in fixed point."""
    tl.static_assert(V % 64 == 0, "a run of outputs has a unit of its own, so one program's")
    gate, up = tl.split(tl.trans(tl.reshape(y, [V // 2, 2, T]), 0, 2, 1))
    n, t = first + tl.arange(0, V // 2), tl.arange(0, T)
    inside = (n < stop)[:, None] & (t < num_tokens)[None, :]
    x = tl.where(inside, gated(gate, up), 0.0)
    P: tl.constexpr = (N + 255) // 256 * 256
    store_fixed_point(x, largest(x, 0), n, inside, out, row + t.to(tl.int64), P)


@jit
def fixed_in_kernel(
    columns,  # int8 [B, 8, P] and
    wide_columns,  # float16 [B, 4, P] and
    halves,  # int8 [B, 2, P] and
    unit,  # float32 [B, R]: x in fixed point
    experts,  # int32 [B * TOP]
    low,  # [E, 2 * I, W] and
    high,  # of 3 bits [E, 2 * I, W]
    scale,  # int32 [E, words, 2 * I / rows that share one] and
    zero,  # alike
    out_columns,  # of out [B * TOP, I], in fixed point
    out_wide_columns,
    out_halves,
    out_unit,
    shared_columns,  # of out of shared experts [B, shared * I], in fixed point
    shared_wide_columns,
    shared_halves,
    shared_unit,
    gate_low,  # the shared experts' [shared * I, W] and so on, with NUM_SHARED
    gate_high,
    gate_scale,
    gate_zero,
    up_low,
    up_high,
    up_scale,
    up_zero,
    num_rows,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,  # B, or more, a power of two up to 4
    EARLY: tl.constexpr,  # blocks of codes that are read before the inputs are there
    AT_ONCE: tl.constexpr,  # blocks that a step of the loop multiplies by
    PREFETCH: tl.constexpr,  # 1: the second cache reads scales meanwhile, 2: codes too
    FORM: tl.constexpr,
    SHARED_FORM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """silu(gate) * up of the rows and the experts that they chose, a tile of a pair by program.

    Programs of shared experts come first.
    """
    BLOCKS: tl.constexpr = (D + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if FORM[0] == 8 else 32)
    first = tl.program_id(0) * (V // 2)
    n = tl.minimum(first + tl.arange(0, V) // 2, I - 1)
    is_up = tl.arange(0, V) % 2 == 1
    x = (columns, wide_columns, halves, unit)
    pair = tl.program_id(1) - NUM_SHARED
    if NUM_SHARED > 0:
        if pair < 0:
            SIZE: tl.constexpr = BLOCKS * (64 if SHARED_FORM[0] == 8 else 32)
            own = tl.program_id(1) * I + n
            group = own // SHARED_FORM[5]
            source = (
                tl.where(is_up, up_low + own * SIZE, gate_low + own * SIZE),
                tl.where(is_up, up_high + own * SIZE, gate_high + own * SIZE),
                tl.where(is_up, up_scale + group, gate_scale + group),
                tl.where(is_up, up_zero + group, gate_zero + group),
                (NUM_SHARED * I + SHARED_FORM[5] - 1) // SHARED_FORM[5],
            )
            reads = first_reads(
                source, 0, BLOCKS, True, T, D, EARLY, AT_ONCE, BLOCKS, PREFETCH, SHARED_FORM
            )
            wait_first(IS_LINKED)
            y = fixed_product(
                source, reads, x, 0, num_rows, 0, BLOCKS, V, T, D, EARLY, AT_ONCE, SHARED_FORM
            )
            out = (shared_columns, shared_wide_columns, shared_halves, shared_unit)
            start = tl.program_id(1) * I
            _store_gated(y, start + first, start + I, out, 0, num_rows, NUM_SHARED * I, V, T)
            return
    wait_first(IS_LINKED)
    expert = tl.load(experts + pair).to(tl.int64)
    row = tl.where(is_up, I, 0) + n
    STRIDE: tl.constexpr = (2 * I + FORM[5] - 1) // FORM[5]
    own = (expert * 2 * I + row) * WORDS
    source = (
        low + own,
        high + own,
        scale + expert * SCALE_WORDS * STRIDE + row // FORM[5],
        zero + expert * ZERO_WORDS * STRIDE + row // FORM[5],
        STRIDE,
    )
    reads = first_reads(source, 0, BLOCKS, True, 1, D, 0, AT_ONCE, BLOCKS, PREFETCH, FORM)
    y = fixed_product(source, reads, x, pair // TOP, num_rows, 0, BLOCKS, V, 1, D, 0, AT_ONCE, FORM)
    out = (out_columns, out_wide_columns, out_halves, out_unit)
    _store_gated(y, first, I, out, pair, 1, I, V, 1)


@jit
def fixed_out_kernel(
    columns,  # of x [B * TOP, I], in fixed point
    wide_columns,
    halves,
    unit,
    shared_columns,  # of x of shared experts [B, shared * I]
    shared_wide_columns,
    shared_halves,
    shared_unit,
    experts,  # int32 [B * TOP]
    weights,  # float32 [B * TOP]
    low,  # [E, D, W] and
    high,  # of 3 bits [E, D, W]
    scale,  # int32 [E, words, D / rows that share one] and
    zero,  # alike
    out,  # [B, SLOTS, D], the first TOP of each row, and one more with NUM_SHARED
    shared_low,  # the shared experts' [D, W] and so on, with NUM_SHARED
    shared_high,
    shared_scale,
    shared_zero,
    num_rows,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_SHARED: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,  # B, or more, a power of two up to 4
    EARLY: tl.constexpr,  # blocks of codes that are read before the inputs are there
    AT_ONCE: tl.constexpr,  # blocks that a step of the loop multiplies by
    PREFETCH: tl.constexpr,  # 1: the second cache reads scales meanwhile, 2: codes too
    FORM: tl.constexpr,
    SHARED_FORM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Weighted outputs of the pairs, and those of the shared experts; a tile of a pair by program.

    What was chosen is known: `fixed_in_kernel`, before this one, starts it after its own wait.
    """
    BLOCKS: tl.constexpr = (I + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if FORM[0] == 8 else 32)
    first = tl.program_id(0) * V
    row = tl.minimum(first + tl.arange(0, V), D - 1)
    n = (first + tl.arange(0, V))[:, None]
    pair = tl.program_id(1) - (1 if NUM_SHARED > 0 else 0)
    if NUM_SHARED > 0:
        if pair < 0:
            K: tl.constexpr = NUM_SHARED * I
            ALL: tl.constexpr = (K + 255) // 256
            own = row * (ALL * (64 if SHARED_FORM[0] == 8 else 32))
            group = row // SHARED_FORM[5]
            source = (
                shared_low + own,
                shared_high + own,
                shared_scale + group,
                shared_zero + group,
                (D + SHARED_FORM[5] - 1) // SHARED_FORM[5],
            )
            reads = first_reads(
                source, 0, ALL, True, T, K, EARLY, AT_ONCE, ALL, PREFETCH, SHARED_FORM
            )
            wait(IS_LINKED)
            x = (shared_columns, shared_wide_columns, shared_halves, shared_unit)
            y = fixed_product(
                source, reads, x, 0, num_rows, 0, ALL, V, T, K, EARLY, AT_ONCE, SHARED_FORM
            )
            t = tl.arange(0, T)[None, :]
            target = out + (t * SLOTS + TOP).to(tl.int64) * D + n
            tl.store(target, y, mask=(n < D) & (t < num_rows))
            return
    # a multiprocessor's cache may still hold an older choice
    expert = tl.load(experts + pair, cache_modifier=".cg").to(tl.int64)
    own, group = expert * D + row, row // FORM[5]
    STRIDE: tl.constexpr = (D + FORM[5] - 1) // FORM[5]
    source = (
        low + own * WORDS,
        high + own * WORDS,
        scale + expert * SCALE_WORDS * STRIDE + group,
        zero + expert * ZERO_WORDS * STRIDE + group,
        STRIDE,
    )
    reads = first_reads(source, 0, BLOCKS, True, 1, I, EARLY, AT_ONCE, BLOCKS, PREFETCH, FORM)
    wait(IS_LINKED)
    x = (columns, wide_columns, halves, unit)
    pairs = tl.num_programs(1)
    y = fixed_product(source, reads, x, pair, pairs, 0, BLOCKS, V, 1, I, EARLY, AT_ONCE, FORM)
    slot = pair // TOP * SLOTS + pair % TOP
    y *= tl.load(weights + pair)
    tl.store(out + slot.to(tl.int64) * D + n, y, mask=n < D)
