"""Triton kernels of the decode step for packed weights: both products of experts.

The launch of few rows takes the shared experts too: it has a program for each pair of a row and an
expert, and a launch of its own would take as long. See `packed_kernels.py`.

Shapes: B rows (one token each), D hidden size, I expert width, E experts, W words of a row,
V = PARTS * N rows and M columns of a tile.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.expert_kernels import gated, program_expert
from kimi_linear.decode.packed_kernels import blocks, prefetch, product, row_of, sum_parts, token_of
from kimi_linear.decode.projection_kernels import wait, wait_first
from kimi_linear.ops.packed.kernels import add_products, block_values, load_scales, load_words
from kimi_linear.ops.runtime import jit, tl


@jit
def _pairs(order, done, stop, place, IS_SORTED: tl.constexpr):
    """The pairs of a row and an expert at some places, and which of them there are."""
    there = done + place < stop
    pair = tl.where(there, done + place, done)
    if IS_SORTED:
        pair = tl.load(order + pair)
    return pair, there


@jit
def _gate_up(
    x,
    order,
    out,
    gate_low,  # pointers [V] of gate's rows and
    gate_high,
    gate_scale,
    gate_zero,
    up_low,  # up's
    up_high,
    up_scale,
    up_zero,
    stride,
    start,  # of the pairs
    stop,
    first,  # output
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    EACH: tl.constexpr,  # pairs of a row of x
    WIDTH: tl.constexpr,  # of a row of out
    V: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    IS_SORTED: tl.constexpr,
    FORM: tl.constexpr,
):
    """out [pairs, WIDTH] gets silu(gate) * up of pairs, for a tile of I outputs."""
    BLOCKS: tl.constexpr = (D + 255) // 256
    SHARE: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS
    IS_WHOLE: tl.constexpr = SHARE * PARTS * 256 == D
    dtype: tl.constexpr = x.dtype.element_ty
    row_block, column_block = blocks(0, SHARE, V, M, PARTS)
    for done in range(start, stop, M // PARTS):
        pair, _ = _pairs(order, done, stop, token_of(M, PARTS), IS_SORTED)
        row = x + (pair // EACH).to(tl.int64) * D
        gate = tl.zeros([V, M], tl.float32)
        up = tl.zeros([V, M], tl.float32)
        for i in range(SHARE):
            block = tl.minimum(row_block + i, BLOCKS - 1)
            words, upper = load_words(gate_low, gate_high, block, FORM)
            up_words, up_upper = load_words(up_low, up_high, block, FORM)
            scales = load_scales(gate_scale, gate_zero, block, stride, D, FORM)
            up_scales = load_scales(up_scale, up_zero, block, stride, D, FORM)
            values = block_values(words, upper, scales, block, FORM, dtype)
            gate = add_products(gate, values, row, column_block + i, D, IS_WHOLE)
            values = block_values(up_words, up_upper, up_scales, block, FORM, dtype)
            up = add_products(up, values, row, column_block + i, D, IS_WHOLE)
        y = gated(sum_parts(gate, 0, V, M, PARTS), sum_parts(up, 0, V, M, PARTS))
        pair, there = _pairs(order, done, stop, tl.arange(0, M // PARTS), IS_SORTED)
        n = first + tl.arange(0, V // PARTS)[:, None]
        place = out + pair[None, :].to(tl.int64) * WIDTH + n
        tl.store(place, y, mask=(n < I) & there[None, :])


@jit
def packed_in_kernel(
    x,  # [B, D], normed
    experts,  # int32 [B * TOP], without IS_SORTED
    order,  # int32 [B * TOP] and
    begin,  # int32 [E + 1] and
    active,  # int32 [E + 1], see `group_kernel`
    low,  # [E, 2 * I, W] and
    high,  # of 3 bits [E, 2 * I, W]
    scale,  # int32 [E, words, 2 * I / rows that share one] and
    zero,  # alike
    out,  # [B * TOP, I]
    shared_gate_low,  # the shared experts' [shared * I, W] and so on, with NUM_SHARED
    shared_gate_high,
    shared_gate_scale,
    shared_gate_zero,
    shared_up_low,
    shared_up_high,
    shared_up_scale,
    shared_up_zero,
    shared_out,  # [B, shared * I]
    num_rows,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    NUM_SHARED: tl.constexpr,  # shared experts that this launch takes too, without IS_SORTED
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    IS_SORTED: tl.constexpr,
    FORM: tl.constexpr,
    SHARED_FORM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """silu(gate) * up of the rows that chose an expert, a tile of an expert by program.

    Programs of shared experts, whose weights need no choice, come first.
    """
    WORDS: tl.constexpr = (D + 255) // 256 * (64 if FORM[0] == 8 else 32)
    STRIDE: tl.constexpr = (2 * I + FORM[5] - 1) // FORM[5]
    SHARE: tl.constexpr = ((D + 255) // 256 + PARTS - 1) // PARTS
    first = tl.program_id(0) * (V // PARTS)
    row = tl.minimum(first + row_of(V, PARTS), I - 1)
    pair = tl.program_id(1) - NUM_SHARED
    if NUM_SHARED > 0:
        if pair < 0:
            SIZE: tl.constexpr = (D + 255) // 256 * (64 if SHARED_FORM[0] == 8 else 32)
            own = tl.program_id(1) * I + row
            group = own // SHARED_FORM[5]
            if IS_LINKED:
                row_block, _ = blocks(0, SHARE, V, M, PARTS)
                prefetch(shared_gate_low + own * SIZE, row_block, SHARE, D, SHARED_FORM)
                prefetch(shared_up_low + own * SIZE, row_block, SHARE, D, SHARED_FORM)
            wait_first(IS_LINKED)
            _gate_up(
                x,
                order,
                shared_out + tl.program_id(1) * I,
                shared_gate_low + own * SIZE,
                shared_gate_high + own * SIZE,
                shared_gate_scale + group,
                shared_gate_zero + group,
                shared_up_low + own * SIZE,
                shared_up_high + own * SIZE,
                shared_up_scale + group,
                shared_up_zero + group,
                (NUM_SHARED * I + SHARED_FORM[5] - 1) // SHARED_FORM[5],
                0,
                num_rows,
                first,
                D,
                I,
                1,
                NUM_SHARED * I,
                V,
                M,
                PARTS,
                False,
                SHARED_FORM,
            )
            return
    wait_first(IS_LINKED)
    if IS_SORTED:
        expert, start, stop = program_expert(begin, active)
    else:
        expert, start, stop = tl.load(experts + pair), pair, pair + 1
    expert = expert.to(tl.int64)
    own = (expert * 2 * I + row) * WORDS
    scale += expert * SCALE_WORDS * STRIDE
    zero += expert * ZERO_WORDS * STRIDE
    _gate_up(
        x,
        order,
        out,
        low + own,
        high + own,
        scale + row // FORM[5],
        zero + row // FORM[5],
        low + own + I * WORDS,
        high + own + I * WORDS,
        scale + (row + I) // FORM[5],
        zero + (row + I) // FORM[5],
        STRIDE,
        start,
        stop,
        first,
        D,
        I,
        TOP,
        I,
        V,
        M,
        PARTS,
        IS_SORTED,
        FORM,
    )


@jit
def _down(
    x,  # [pairs, K]
    order,
    weights,  # float32 [pairs]
    out,
    low,  # pointers [V] of a tile's rows
    high,
    scale,
    zero,
    stride,
    start,  # of the pairs
    stop,
    first,  # output
    D: tl.constexpr,
    EACH: tl.constexpr,  # pairs of a row
    SLOTS: tl.constexpr,
    SLOT: tl.constexpr,  # the first that is written to
    V: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    IS_WEIGHTED: tl.constexpr,
    IS_SORTED: tl.constexpr,
    FORM: tl.constexpr,
):
    """Slots of out [B, SLOTS, D] get the products of pairs, for a tile of outputs."""
    SHARE: tl.constexpr = ((K + 255) // 256 + PARTS - 1) // PARTS
    IS_WHOLE: tl.constexpr = SHARE * PARTS * 256 == K
    for done in range(start, stop, M // PARTS):
        pair, _ = _pairs(order, done, stop, token_of(M, PARTS), IS_SORTED)
        row = x + pair.to(tl.int64) * K
        y = product(
            low, high, scale, zero, row, stride, 0, K, SHARE, V, M, PARTS, K, IS_WHOLE, FORM
        )
        y = sum_parts(y, 0, V, M, PARTS)
        pair, there = _pairs(order, done, stop, tl.arange(0, M // PARTS), IS_SORTED)
        if IS_WEIGHTED:
            y *= tl.load(weights + pair)[None, :]
        slot = pair // EACH * SLOTS + SLOT + pair % EACH
        n = first + tl.arange(0, V // PARTS)[:, None]
        tl.store(out + slot[None, :].to(tl.int64) * D + n, y, mask=(n < D) & there[None, :])


@jit
def packed_out_kernel(
    x,  # [B * TOP, I]
    experts,  # int32 [B * TOP], without IS_SORTED
    order,  # int32 [B * TOP] and
    begin,  # int32 [E + 1] and
    active,  # int32 [E + 1], see `group_kernel`
    weights,  # float32 [B * TOP]
    low,  # [E, D, W] and
    high,  # of 3 bits [E, D, W]
    scale,  # int32 [E, words, D / rows that share one] and
    zero,  # alike
    out,  # [B, SLOTS, D], the first TOP of each row, and one more with NUM_SHARED
    shared_x,  # [B, shared * I] and
    shared_low,  # the shared experts' [D, W] and so on, with NUM_SHARED
    shared_high,
    shared_scale,
    shared_zero,
    num_rows,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_SHARED: tl.constexpr,  # shared experts that this launch takes too, without IS_SORTED
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    V: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    IS_SORTED: tl.constexpr,
    FORM: tl.constexpr,
    SHARED_FORM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Weighted outputs of the pairs of an expert, a tile of an expert by program.

    What was chosen is known: `packed_in_kernel`, before this one, starts it after its own wait.
    """
    WORDS: tl.constexpr = (I + 255) // 256 * (64 if FORM[0] == 8 else 32)
    STRIDE: tl.constexpr = (D + FORM[5] - 1) // FORM[5]
    first = tl.program_id(0) * (V // PARTS)
    row = tl.minimum(first + row_of(V, PARTS), D - 1)
    pair = tl.program_id(1) - (1 if NUM_SHARED > 0 else 0)
    if NUM_SHARED > 0:
        if pair < 0:
            K: tl.constexpr = NUM_SHARED * I
            SHARED_STRIDE: tl.constexpr = (D + SHARED_FORM[5] - 1) // SHARED_FORM[5]
            own = row * ((K + 255) // 256 * (64 if SHARED_FORM[0] == 8 else 32))
            group = row // SHARED_FORM[5]
            if IS_LINKED:
                SHARED_SHARE: tl.constexpr = ((K + 255) // 256 + PARTS - 1) // PARTS
                row_block, _ = blocks(0, SHARED_SHARE, V, M, PARTS)
                prefetch(shared_low + own, row_block, SHARED_SHARE, K, SHARED_FORM)
            wait(IS_LINKED)
            _down(
                shared_x,
                order,
                weights,
                out,
                shared_low + own,
                shared_high + own,
                shared_scale + group,
                shared_zero + group,
                SHARED_STRIDE,
                0,
                num_rows,
                first,
                D,
                1,
                SLOTS,
                TOP,
                V,
                M,
                PARTS,
                K,
                False,
                False,
                SHARED_FORM,
            )
            return
    if IS_SORTED:
        wait(IS_LINKED)
        expert, start, stop = program_expert(begin, active)
    else:
        # a multiprocessor's cache may still hold an older choice
        expert = tl.load(experts + pair, cache_modifier=".cg")
        start, stop = pair, pair + 1
    expert = expert.to(tl.int64)
    low += (expert * D + row) * WORDS
    if not IS_SORTED:
        if IS_LINKED:
            SHARE: tl.constexpr = ((I + 255) // 256 + PARTS - 1) // PARTS
            row_block, _ = blocks(0, SHARE, V, M, PARTS)
            prefetch(low, row_block, SHARE, I, FORM)
        wait(IS_LINKED)
    _down(
        x,
        order,
        weights,
        out,
        low,
        high + (expert * D + row) * WORDS,
        scale + expert * SCALE_WORDS * STRIDE + row // FORM[5],
        zero + expert * ZERO_WORDS * STRIDE + row // FORM[5],
        STRIDE,
        start,
        stop,
        first,
        D,
        TOP,
        SLOTS,
        0,
        V,
        M,
        PARTS,
        I,
        True,
        IS_SORTED,
        FORM,
    )
