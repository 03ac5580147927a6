"""Triton kernels of a decode step with several tokens a row: Kimi Delta Attention.

A program takes the tokens of a sequence one after the other, with a part of a head's state in
registers. First it takes in what the step before has left pending (`cache/pending.py`); if this
step is to be taken back too, the state is written then, and the tokens' own updates are written
down; else the state is written at the end.

See `projection_kernels.py`, also for IS_LINKED; `attention_kernels.py` has those of one token.

Shapes: S sequences, T tokens of each, B = S * T rows, H heads, K key and value size, W taps.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.addresses import CACHED, COUNTERS, PENDING, ROW, KDAAddresses, columns
from kimi_linear.decode.attention_kernels import (
    decay_of,
    gated_heads,
    projected_gate,
    store_gated,
    store_normed,
    take_in,
)
from kimi_linear.decode.projection_kernels import is_last_program, pointer_to, wait
from kimi_linear.ops.runtime import jit, tl

CONV_STATE, RECURRENT_STATE, _, _, UPDATES, INPUTS, CAPACITY = columns(KDAAddresses)
NOWHERE = -(1 << 30) if tl is None else tl.constexpr(-(1 << 30))  # a place before all tokens


@jit
def _conv_inputs(
    place, x, conv, inputs, channel, sizes, x_stride, INNER: tl.constexpr, WIDTH: tl.constexpr
):
    """Inputs of a convolution [channels, places] at the given places, counted from this step's
    first token: its own, pending ones before them, and those of the convolution's state.

    Args:
        place: [places].
        x, conv, inputs: Where the sequence's lie, of this convolution.
        channel: [channels].
        sizes: Cached and pending tokens, and the capacity for those.
    """
    cached, pending, capacity = sizes
    is_own, is_in_state = place >= 0, place < -pending
    own = tl.load(
        x + place[None, :] * x_stride + channel[:, None], mask=is_own[None, :], other=0.0
    ).to(tl.float32)
    before = conv + channel[:, None] * (WIDTH - 1) + (WIDTH - 1 + pending + place)[None, :]
    is_there = is_in_state & (place >= 1 - WIDTH - pending)
    own += tl.load(before, mask=is_there[None, :], other=0.0).to(tl.float32)
    slot = (cached + place) & (capacity - 1)
    noted = inputs + slot[None, :] * 3 * INNER + channel[:, None]
    is_noted = (place < 0) & (place >= -pending)
    return own + tl.load(noted, mask=is_noted[None, :], other=0.0).to(tl.float32)


@jit
def _convolved(x, taps, channel, WIDTH: tl.constexpr, PLACES: tl.constexpr):
    """SiLU of the convolution of inputs [channels, PLACES], oldest first."""
    j = tl.arange(0, PLACES)
    tap = taps + channel[:, None] * WIDTH + j[None, :]
    y = tl.sum(x * tl.load(tap, mask=(j < WIDTH)[None, :], other=0.0).to(tl.float32), axis=1)
    return y * tl.sigmoid(y)


@jit
def _move_inputs(
    x,
    conv,
    inputs,
    is_noted,
    channel,
    sizes,
    x_stride,
    num_tokens,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Move the convolutions' states of some channels to where the recurrent state is now, and write
    down the inputs that are pending then; arguments as of `_conv_inputs`."""
    cached, _, capacity = sizes
    j = tl.arange(0, PLACES)
    past = tl.where(is_noted, 0, num_tokens) + 1 - WIDTH + j
    past = tl.where(j < WIDTH - 1, past, NOWHERE)
    for kind in tl.static_range(3):
        state = conv + kind * INNER * (WIDTH - 1)
        moved = _conv_inputs(
            past,
            x + kind * INNER,
            state,
            inputs + kind * INNER,
            channel,
            sizes,
            x_stride,
            INNER,
            WIDTH,
        )
        tl.debug_barrier()
        place = state + channel[:, None] * (WIDTH - 1) + j[None, :]
        tl.store(place, moved, mask=(j < WIDTH - 1)[None, :])
        if is_noted:
            for t in range(num_tokens):
                slot = (cached + t) & (capacity - 1)
                new = tl.load(x + t * x_stride + kind * INNER + channel)
                tl.store(inputs + (slot * 3 + kind) * INNER + channel, new)


@jit
def delta_rule_kernel(
    x,  # [B, x_stride]: the projections q, k, v [H * K] each, f_a and g_a [K] each, b [H]
    gates,  # [B, 2, H * K], f_b of f_a and g_b of g_a, with HAS_GATES
    q_taps,  # [H * K, W]
    k_taps,
    v_taps,
    f_b,  # [H * K, K]
    A_log,  # float32 [H]
    dt_bias,  # float32 [H * K]
    g_b,  # [H * K, K]
    norm,  # [K]
    table,  # int64, columns of `KDAAddresses`
    counters,  # int64 [S, 4], columns of `Counters`
    mixed,  # float32 [B, H, K], to be written
    squares,  # float32 [B, H, K / BLOCK] and
    arrived,  # int32 [B, H], 0, between the programs of a head
    out,  # [B, out_stride], to be written with IN_ONE
    columns,  # int8 [B, 8, FIXED] and
    wide_columns,  # float16 [B, 4, FIXED] and
    halves,  # int8 [B, 2, FIXED] and
    unit,  # float32 [B, FIXED / 32]: out in fixed point; without FIXED anything
    x_stride,
    out_stride,
    num_tokens,  # T
    eps,
    FIXED: tl.constexpr,
    IN_ONE: tl.constexpr,  # whether to do what else `delta_rule_out_kernel` does
    H: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,  # WIDTH, or more, a power of two
    BLOCK: tl.constexpr,  # columns of the state of a program
    HAS_GATES: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """The delta rule, a block of a head's values by program; the last one of a head ends it."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = tl.arange(0, K), tl.arange(0, PLACES)
    value = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    channel, value_channel = head * K + i, head * K + value
    inner: tl.constexpr = H * K
    BLOCKS: tl.constexpr = K // BLOCK
    first = sequence * num_tokens
    x += first * x_stride
    gates += first * 2 * inner
    mixed += first * inner
    squares += (first * H + head) * BLOCKS
    # everything that the kernels before this one do not write
    counters += sequence * COUNTERS
    cached, pending = tl.load(counters + CACHED), tl.load(counters + PENDING)
    cached_row, capacity = tl.load(counters + ROW), tl.load(table + CAPACITY)
    state = pointer_to(tl.load(table + RECURRENT_STATE), A_log) + (cached_row * H + head) * K * K
    place = state + i[:, None] * K + value[None, :]
    state_KV = tl.load(place)
    updates = tl.load(table + UPDATES)
    is_noted = updates != 0
    noted = pointer_to(updates, A_log) + cached_row * capacity * 3 * inner
    for p in range(pending):
        update = noted + ((cached - pending + p) & (capacity - 1)) * 3 * inner
        key = tl.load(update + inner + channel)
        correction = tl.load(update + 2 * inner + value_channel)
        state_KV *= tl.load(update + channel)[:, None]
        state_KV += key[:, None] * correction[None, :]
    if pending > 0:
        tl.store(place, state_KV)
    conv = pointer_to(tl.load(table + CONV_STATE), x) + cached_row * 3 * inner * (WIDTH - 1)
    past: tl.constexpr = inner * (WIDTH - 1)
    inputs = pointer_to(tl.load(table + INPUTS), x) + cached_row * capacity * 3 * inner
    if not HAS_GATES:
        f_w = tl.load(f_b + channel[:, None] * K + i[None, :])
        if IN_ONE:
            g_w = tl.load(g_b + value_channel[:, None] * K + i[None, :])
    if IN_ONE:
        weight = tl.load(norm + value).to(tl.float32)
    A = tl.exp(tl.load(A_log + head))
    bias = tl.load(dt_bias + channel)
    sizes = (cached, pending, capacity)
    wait(IS_LINKED)
    for t in range(num_tokens):
        window = tl.where(j < WIDTH, t + 1 - WIDTH + j, NOWHERE)
        q_in = _conv_inputs(window, x, conv, inputs, channel, sizes, x_stride, inner, WIDTH)
        k_in = _conv_inputs(
            window, x + inner, conv + past, inputs + inner, channel, sizes, x_stride, inner, WIDTH
        )
        v_in = _conv_inputs(
            window,
            x + 2 * inner,
            conv + 2 * past,
            inputs + 2 * inner,
            value_channel,
            sizes,
            x_stride,
            inner,
            WIDTH,
        )
        row = x + t * x_stride + 3 * inner
        beta = tl.sigmoid(tl.load(row + 2 * K + head).to(tl.float32))
        if HAS_GATES:
            f = tl.load(gates + t * 2 * inner + channel).to(tl.float32)
        else:
            f = projected_gate(f_w, row + i)
        decay = decay_of(f + bias, A)
        q = _convolved(q_in, q_taps, channel, WIDTH, PLACES)
        k = _convolved(k_in, k_taps, channel, WIDTH, PLACES)
        v = _convolved(v_in, v_taps, value_channel, WIDTH, PLACES)
        state_KV, o, k, correction = take_in(state_KV, decay, q, k, v, beta, K)
        if not IN_ONE:
            tl.store(mixed + t * inner + value_channel, o)
        else:
            if HAS_GATES:
                gate = tl.load(gates + (t * 2 + 1) * inner + value_channel).to(tl.float32)
            else:
                gate = projected_gate(g_w, row + K + i)
            square = squares + t * H * BLOCKS + tl.program_id(2)
            store_gated(o, gate, weight, mixed + t * inner + value_channel, square)
        if is_noted:
            update = noted + ((cached + t) & (capacity - 1)) * 3 * inner
            tl.store(update + 2 * inner + value_channel, correction)
            if tl.program_id(2) == 0:
                tl.store(update + channel, decay)
                tl.store(update + inner + channel, k)
    if not is_noted:
        tl.store(place, state_KV)
    if IN_ONE:
        if is_last_program(arrived + first * H + head, BLOCKS):
            _move_inputs(
                x,
                conv,
                inputs,
                tl.load(table + INPUTS) != 0,
                channel,
                sizes,
                x_stride,
                num_tokens,
                inner,
                WIDTH,
                PLACES,
            )
            fixed = (columns, wide_columns, halves, unit)
            all_squares = squares + tl.arange(0, BLOCKS)
            for t in range(num_tokens):
                token_row = first + t
                store_normed(
                    mixed + t * inner + channel,
                    all_squares + t * H * BLOCKS,
                    eps,
                    out + token_row * out_stride,
                    channel,
                    fixed,
                    token_row,
                    K,
                    FIXED,
                )


@jit
def delta_rule_out_kernel(
    x,  # as in `delta_rule_kernel`
    gates,
    g_b,  # [H * K, K]
    norm,  # [K]
    table,
    counters,
    mixed,  # float32 [B, H, K], what `delta_rule_kernel` has written
    out,  # [B, out_stride]
    columns,  # int8 [B, 8, FIXED] and
    wide_columns,  # float16 [B, 4, FIXED] and
    halves,  # int8 [B, 2, FIXED] and
    unit,  # float32 [B, FIXED / 32]: out in fixed point; without FIXED anything
    x_stride,
    out_stride,
    num_tokens,  # T
    eps,
    FIXED: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    HAS_GATES: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Gated norm of a head of a row; the first row of a sequence moves the convolutions' states to
    where the recurrent state is now, and writes down the inputs that are pending then."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, K)
    channel = head * K + i
    inner: tl.constexpr = H * K
    weight = tl.load(norm + i).to(tl.float32)
    if not HAS_GATES:
        g_w = tl.load(g_b + channel[:, None] * K + i[None, :])
    token = row % num_tokens
    counters += (row // num_tokens) * COUNTERS
    cached, pending = tl.load(counters + CACHED), tl.load(counters + PENDING)
    cached_row, capacity = tl.load(counters + ROW), tl.load(table + CAPACITY)
    conv = pointer_to(tl.load(table + CONV_STATE), x) + cached_row * 3 * inner * (WIDTH - 1)
    noted = pointer_to(tl.load(table + INPUTS), x) + cached_row * capacity * 3 * inner
    is_noted = tl.load(table + INPUTS) != 0
    wait(IS_LINKED)
    x += row * x_stride
    if token == 0:
        sizes = (cached, pending, capacity)
        _move_inputs(
            x, conv, noted, is_noted, channel, sizes, x_stride, num_tokens, inner, WIDTH, PLACES
        )
    o = tl.load(mixed + (row * H + head) * K + i)
    if HAS_GATES:
        gate = tl.load(gates + (row * 2 + 1) * inner + channel).to(tl.float32)
    else:
        gate = projected_gate(g_w, x + 3 * inner + K + i)
    fixed = (columns, wide_columns, halves, unit)
    gated_heads(o, gate, weight, eps, out + row * out_stride, channel, fixed, row, K, FIXED)
