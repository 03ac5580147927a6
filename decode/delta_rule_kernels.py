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
from kimi_linear.decode.attention_kernels import gated_heads
from kimi_linear.decode.projection_kernels import pointer_to, wait
from kimi_linear.ops.runtime import jit, tl

CONV_STATE, RECURRENT_STATE, _, _, UPDATES, INPUTS, CAPACITY = columns(KDAAddresses)


@jit
def _earlier(conv, inputs, taps, channel, token, sizes, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """What inputs before this step add to the convolution of each of its tokens.

    Args:
        conv, inputs: State and pending inputs of the sequence, of this convolution.
        channel: [channels].
        token: [tokens], counted from this step's first one.
        sizes: Cached and pending tokens, and the capacity for those.

    Returns:
        [tokens, channels].
    """
    cached, pending, capacity = sizes
    y = tl.zeros([token.shape[0], channel.shape[0]], dtype=tl.float32)
    for j in tl.static_range(WIDTH - 1):
        place = (token + (j + 1 - WIDTH))[:, None]
        slot = (cached + place) & (capacity - 1)
        noted = inputs + slot * 3 * INNER + channel[None, :]
        held = conv + channel[None, :] * (WIDTH - 1) + (WIDTH - 1 + pending + place)
        before = tl.where(place < -pending, held, noted)
        x = tl.load(before, mask=place < 0, other=0.0).to(tl.float32)
        y += x * tl.load(taps + channel * WIDTH + j).to(tl.float32)[None, :]
    return y


@jit
def _convolved(earlier, x, x_stride, taps, channel, token, num_tokens, WIDTH: tl.constexpr):
    """SiLU of the convolution [tokens, channels], with the step's own inputs x."""
    y = earlier
    for j in tl.static_range(WIDTH):
        if token.shape[0] > 1 or j == WIDTH - 1:
            place = (token + (j + 1 - WIDTH))[:, None]
            own = tl.load(
                x + place * x_stride + channel[None, :],
                mask=(place >= 0) & (place < num_tokens),
                other=0.0,
            )
            tap = tl.load(taps + channel * WIDTH + j).to(tl.float32)
            y += own.to(tl.float32) * tap[None, :]
    return y * tl.sigmoid(y)


@jit
def _of(rows, is_it):
    """The one of rows [tokens, channels] that `is_it` [tokens, 1] says."""
    return tl.sum(tl.where(is_it, rows, 0.0), axis=0)


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
    table,  # int64, columns of `KDAAddresses`
    counters,  # int64 [S, 4], columns of `Counters`
    out,  # float32 [B, H, K], to be written
    x_stride,
    num_tokens,  # T
    H: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,  # num_tokens, or more, a power of two
    BLOCK: tl.constexpr,  # columns of the state of a program
    HAS_GATES: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """The delta rule, a block of a head's values by program, as in `kda_kernel`."""
    sequence, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    i, token = tl.arange(0, K), tl.arange(0, TOKENS)
    value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, value_channel = head * K + i, head * K + value
    inner: tl.constexpr = H * K
    first = sequence * num_tokens
    x += first * x_stride
    gates += first * 2 * inner
    out += first * inner
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
    sizes = (cached, pending, capacity)
    q = _earlier(conv, inputs, q_taps, channel, token, sizes, inner, WIDTH)
    k = _earlier(conv + past, inputs + inner, k_taps, channel, token, sizes, inner, WIDTH)
    v = _earlier(
        conv + 2 * past, inputs + 2 * inner, v_taps, value_channel, token, sizes, inner, WIDTH
    )
    if not HAS_GATES:
        f_w = tl.load(f_b + channel[:, None] * K + i[None, :])
    A = tl.exp(tl.load(A_log + head))
    bias = tl.load(dt_bias + channel)
    wait(IS_LINKED)
    # of all tokens, [TOKENS, channels]
    q = _convolved(q, x, x_stride, q_taps, channel, token, num_tokens, WIDTH)
    k = _convolved(k, x + inner, x_stride, k_taps, channel, token, num_tokens, WIDTH)
    v = _convolved(v, x + 2 * inner, x_stride, v_taps, value_channel, token, num_tokens, WIDTH)
    q = q / tl.sqrt((tl.sum(q * q, axis=1) + 1e-6) * K)[:, None]
    k = k / tl.sqrt(tl.sum(k * k, axis=1) + 1e-6)[:, None]
    row, is_there = x + token * x_stride + 3 * inner, token < num_tokens
    beta = tl.sigmoid(tl.load(row + 2 * K + head, mask=is_there, other=0.0).to(tl.float32))
    if HAS_GATES:
        f = tl.load(
            gates + (token * 2 * inner)[:, None] + channel[None, :],
            mask=is_there[:, None],
            other=0.0,
        ).to(tl.float32)
    else:
        f = tl.zeros([TOKENS, K], dtype=tl.float32)
        for t in range(num_tokens):
            f_a = tl.load(x + t * x_stride + 3 * inner + i).to(tl.float32)
            product = tl.sum(f_w.to(tl.float32) * f_a[None, :], axis=1)
            f += tl.where((token == t)[:, None], product[None, :], 0.0)
    f += bias[None, :]
    softplus = tl.maximum(f, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(f)))
    decay = tl.exp(-A * softplus)
    for t in range(num_tokens):
        is_it = (token == t)[:, None]
        decay_t, k_t = _of(decay, is_it), _of(k, is_it)
        v_t, q_t = _of(v, is_it), _of(q, is_it)
        beta_t = tl.sum(tl.where(token == t, beta, 0.0))
        state_KV *= decay_t[:, None]
        correction = beta_t * (v_t - tl.sum(state_KV * k_t[:, None], axis=0))
        state_KV += k_t[:, None] * correction[None, :]
        tl.store(out + t * inner + value_channel, tl.sum(state_KV * q_t[:, None], axis=0))
        if is_noted:
            update = noted + ((cached + t) & (capacity - 1)) * 3 * inner
            tl.store(update + 2 * inner + value_channel, correction)
            if tl.program_id(0) == 0:
                tl.store(update + channel, decay_t)
                tl.store(update + inner + channel, k_t)
    if not is_noted:
        tl.store(place, state_KV)


@jit
def _last_inputs(conv, now, kind, channel, j, sizes, INNER: tl.constexpr, WIDTH: tl.constexpr):
    """The last WIDTH - 1 inputs [channels, j] of a convolution before the step's token `now`."""
    x, x_stride, noted, cached, pending, capacity = sizes
    place = (now + 1 - WIDTH + j)[None, :]
    is_there = (j < WIDTH - 1)[None, :]
    lane = kind * INNER + channel[:, None]
    own = x + place * x_stride + lane
    slot = (cached + place) & (capacity - 1)
    held = conv + lane * (WIDTH - 1) + (WIDTH - 1 + pending + place)
    before = tl.where(place < -pending, held, noted + slot * 3 * INNER + lane)
    return tl.load(tl.where(place < 0, before, own), mask=is_there)


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
    TAPS: tl.constexpr,  # WIDTH - 1, or more, a power of two
    HAS_GATES: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Gated norm of a head of a row. Inputs that are pending are written down; the first row of a
    sequence moves the convolutions' states to where the recurrent state is now."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    i, j = tl.arange(0, K), tl.arange(0, TAPS)
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
    if is_noted:
        place = noted + ((cached + token) & (capacity - 1)) * 3 * inner + channel
        for kind in tl.static_range(3):
            tl.store(place + kind * inner, tl.load(x + kind * inner + channel))
    if (token == 0) & ((pending > 0) | (not is_noted)):
        now = tl.where(is_noted, 0, num_tokens)
        sizes = (x, x_stride, noted, cached, pending, capacity)
        q = _last_inputs(conv, now, 0, channel, j, sizes, inner, WIDTH)
        k = _last_inputs(conv, now, 1, channel, j, sizes, inner, WIDTH)
        v = _last_inputs(conv, now, 2, channel, j, sizes, inner, WIDTH)
        tl.debug_barrier()
        place = conv + channel[:, None] * (WIDTH - 1) + j[None, :]
        is_place = (j < WIDTH - 1)[None, :]
        tl.store(place, q, mask=is_place)
        tl.store(place + inner * (WIDTH - 1), k, mask=is_place)
        tl.store(place + 2 * inner * (WIDTH - 1), v, mask=is_place)
    o = tl.load(mixed + (row * H + head) * K + i)
    if HAS_GATES:
        gate = tl.load(gates + (row * 2 + 1) * inner + channel).to(tl.float32)
    else:
        gate = tl.sum(
            g_w.to(tl.float32) * tl.load(x + 3 * inner + K + i).to(tl.float32)[None, :], axis=1
        )
    fixed = (columns, wide_columns, halves, unit)
    gated_heads(o, gate, weight, eps, out + row * out_stride, channel, fixed, row, K, FIXED)
