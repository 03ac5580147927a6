"""Triton kernels of the decode step's attention: KDA, and MLA on absorbed latents.

See `projection_kernels.py`, also for IS_LINKED.

Shapes: B rows (one token each, T of a sequence in turn), D hidden size, H heads, K key and value
size of KDA, W taps, N key size without the shared part, V value size, L latent rank, P shared key
part, R = L + P.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.addresses import CACHED, COUNTERS, ROW, KDAAddresses, LatentAddresses
from kimi_linear.decode.addresses import columns as table_columns
from kimi_linear.decode.fixed_point_kernels import store_row_fixed_point
from kimi_linear.decode.projection_kernels import norm_scale, pointer_to, wait
from kimi_linear.ops.runtime import jit, tl

CONV_STATE, RECURRENT_STATE, *_ = table_columns(KDAAddresses)
PREFIX, PREFIX_TOKENS, PREFIX_STRIDE, TAIL, TAIL_STRIDE, *_ = table_columns(LatentAddresses)
*_, PAGES, PAGES_STRIDE = table_columns(LatentAddresses)


# ---------------------------------------------------------------------------- Kimi Delta Attention
@jit
def _earlier(state, taps, channel, WIDTH: tl.constexpr):
    """What cached inputs add to the convolution of channels [D], and its newest tap [D].

    Tap by tap: in tiles [D, W] the compiler would lay out the state of the rule as it does those.
    """
    y = tl.zeros(channel.shape, tl.float32)
    for j in tl.static_range(WIDTH - 1):
        x = tl.load(state + channel * (WIDTH - 1) + j).to(tl.float32)
        y += x * tl.load(taps + channel * WIDTH + j).to(tl.float32)
    return y, tl.load(taps + channel * WIDTH + WIDTH - 1).to(tl.float32)


@jit
def _convolved(earlier, newest, new):
    """SiLU of the convolution."""
    y = earlier + newest * new.to(tl.float32)
    return y * tl.sigmoid(y)


@jit
def kda_kernel(
    x,  # [B, x_stride]: the projections q, k, v [H * K] each, f_a and g_a [K] each, b [H]
    gates,  # [B, 2, H * K], f_b of f_a and g_b of g_a, with HAS_GATES
    q_taps,  # [H * K, W]
    k_taps,
    v_taps,
    f_b,  # [H * K, K]
    A_log,  # float32 [H]
    dt_bias,  # float32 [H * K]
    table,  # int64, columns of `KDAAddresses`
    out,  # float32 [B, H, K], to be written
    x_stride,
    H: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of the state of a program
    HAS_GATES: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """The delta rule, a block of a head's values by program; those of a state come in turn, so that
    memory is read and written row by row."""
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, K)
    value = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel, value_channel = head * K + i, head * K + value
    inner: tl.constexpr = H * K
    x += row * x_stride
    # everything that the kernels before this one do not write
    state = pointer_to(tl.load(table + RECURRENT_STATE), A_log) + (row * H + head) * K * K
    place = state + i[:, None] * K + value[None, :]
    state_KV = tl.load(place)
    conv = pointer_to(tl.load(table + CONV_STATE), x) + row * 3 * inner * (WIDTH - 1)
    past: tl.constexpr = inner * (WIDTH - 1)
    q_past, q_tap = _earlier(conv, q_taps, channel, WIDTH)
    k_past, k_tap = _earlier(conv + past, k_taps, channel, WIDTH)
    v_past, v_tap = _earlier(conv + 2 * past, v_taps, value_channel, WIDTH)
    if not HAS_GATES:  # summed by columns: by rows, the state would be laid out as this tile is
        f_w = tl.load(f_b + channel[None, :] * K + i[:, None])
    A = tl.exp(tl.load(A_log + head))
    bias = tl.load(dt_bias + channel)
    wait(IS_LINKED)
    q_new, k_new = tl.load(x + channel), tl.load(x + inner + channel)
    v_new = tl.load(x + 2 * inner + value_channel)
    beta = tl.sigmoid(tl.load(x + 3 * inner + 2 * K + head).to(tl.float32))
    if HAS_GATES:
        f = tl.load(gates + row * 2 * inner + channel).to(tl.float32)
    else:
        f_a = tl.load(x + 3 * inner + i).to(tl.float32)
        f = tl.sum(f_w.to(tl.float32) * f_a[:, None], axis=0)
    f += bias
    softplus = tl.maximum(f, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(f)))
    decay = tl.exp(-A * softplus)
    q, k = _convolved(q_past, q_tap, q_new), _convolved(k_past, k_tap, k_new)
    v = _convolved(v_past, v_tap, v_new)
    q = q / tl.sqrt((tl.sum(q * q) + 1e-6) * K)
    k = k / tl.sqrt(tl.sum(k * k) + 1e-6)
    state_KV *= decay[:, None]
    error = beta * (v - tl.sum(state_KV * k[:, None], axis=0))
    state_KV += k[:, None] * error[None, :]
    tl.store(place, state_KV)
    tl.store(out + (row * H + head) * K + value, tl.sum(state_KV * q[:, None], axis=0))


@jit
def gated_heads(o, gate, norm, eps, out, channel, fixed, row, K: tl.constexpr, FIXED: tl.constexpr):
    """Store the gated norm of a head [K], also in fixed point."""
    o *= norm_scale(tl.sum(o * o), K, eps) * norm
    o *= tl.sigmoid(gate)
    tl.store(out + channel, o)
    if FIXED > 0:
        store_row_fixed_point(o, channel, fixed, row, FIXED)


@jit
def kda_out_kernel(
    x,  # as in `kda_kernel`
    gates,
    g_b,  # [H * K, K]
    norm,  # [K]
    table,
    mixed,  # float32 [B, H, K], what `kda_kernel` has written
    out,  # [B, out_stride]
    columns,  # int8 [B, 8, FIXED] and
    wide_columns,  # float16 [B, 4, FIXED] and
    halves,  # int8 [B, 2, FIXED] and
    unit,  # float32 [B, FIXED / 32]: out in fixed point; without FIXED anything
    x_stride,
    out_stride,
    eps,
    FIXED: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    HAS_GATES: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Gated norm of a head, and its channels' step of the convolutions' states."""
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    i, j = tl.arange(0, K), tl.arange(0, TAPS)
    channel = head * K + i
    inner: tl.constexpr = H * K
    x += row * x_stride
    conv = pointer_to(tl.load(table + CONV_STATE), x) + row * 3 * inner * (WIDTH - 1)
    weight = tl.load(norm + i).to(tl.float32)
    if not HAS_GATES:
        g_w = tl.load(g_b + channel[:, None] * K + i[None, :])
    wait(IS_LINKED)
    for kind in tl.static_range(3):
        place = conv + (kind * inner + channel[:, None]) * (WIDTH - 1) + j[None, :]
        # each cached input but the oldest moves to the place before it
        new = tl.load(x + kind * inner + channel)
        past = tl.load(place + 1, mask=(j < WIDTH - 2)[None, :], other=0.0)
        tl.debug_barrier()
        past = tl.where((j == WIDTH - 2)[None, :], new[:, None], past)
        tl.store(place, past, mask=(j < WIDTH - 1)[None, :])
    o = tl.load(mixed + (row * H + head) * K + i)
    if HAS_GATES:
        gate = tl.load(gates + (row * 2 + 1) * inner + channel).to(tl.float32)
    else:
        g_a = tl.load(x + 3 * inner + K + i).to(tl.float32)
        gate = tl.sum(g_w.to(tl.float32) * g_a[None, :], axis=1)
    fixed = (columns, wide_columns, halves, unit)
    gated_heads(o, gate, weight, eps, out + row * out_stride, channel, fixed, row, K, FIXED)


# --------------------------------------------------------------------------------- latent attention
@jit
def page_start(table, row, place, PAGE: tl.constexpr):
    """Where the pool has a row's token, counted in tokens."""
    pages = tl.load(table + PAGES).to(tl.pointer_type(tl.int32))
    page = tl.load(pages + row * tl.load(table + PAGES_STRIDE) + place // PAGE)
    return page.to(tl.int64) * PAGE + place % PAGE


@jit
def absorb_kernel(
    x,  # [B, x_stride]: the projections of the query [H, N + P], of the latent [L] and [P]
    kv_b,  # [H, N + V, L]
    norm,  # [L]
    table,  # int64, columns of `LatentAddresses`
    counters,  # int64 [B / T, 4], columns of `Counters`
    query,  # [B, H, L + P], to be written
    x_stride,
    num_tokens,  # T
    eps,
    FIRST: tl.constexpr,  # first head to do; H for the latent only
    H: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,  # tokens of a page; 0: the cache has no pages
    IS_LINKED: tl.constexpr,
):
    """Write the new latent into the cache, and the queries in the latents' coordinates."""
    row, head = tl.program_id(0).to(tl.int64), FIRST + tl.program_id(1)
    R: tl.constexpr = L + P
    p, n, all_m = tl.arange(0, P), tl.arange(0, N), tl.arange(0, L)
    m = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if FIRST < H:
        own = tl.minimum(head, H - 1)  # the program after the last head writes the latent
        weight = tl.load(kv_b + (own * (N + V) + n[:, None]) * L + m[None, :])
    wait(IS_LINKED)
    x += row * x_stride
    if head == H:
        counters += (row // num_tokens) * COUNTERS
        cached_row = tl.load(counters + ROW)
        place = tl.load(counters + CACHED) + row % num_tokens
        new = pointer_to(tl.load(table + TAIL), x)
        if PAGE > 0:
            new += page_start(table, cached_row, place, PAGE) * R
        else:
            new += cached_row * tl.load(table + TAIL_STRIDE)
            new += (place - tl.load(table + PREFIX_TOKENS)) * R
        latent = tl.load(x + H * (N + P) + all_m).to(tl.float32)
        latent *= norm_scale(tl.sum(latent * latent), L, eps)
        tl.store(new + all_m, latent * tl.load(norm + all_m).to(tl.float32))
        tl.store(new + L + p, tl.load(x + H * (N + P) + L + p))
    elif FIRST < H:
        inner = tl.load(x + head * (N + P) + n).to(tl.float32)
        query += (row * H + head) * R
        tl.store(query + m, tl.sum(weight.to(tl.float32) * inner[:, None], axis=0))
        if tl.program_id(2) == 0:
            tl.store(query + L + p, tl.load(x + head * (N + P) + N + p))


@jit
def _tokens(
    table, cached_row, segments, in_prefix, start, like, R: tl.constexpr, PAGE: tl.constexpr
):
    """Where a row's latents from a token of the prefix, or of the tail, on lie."""
    prefix, tail = segments
    base = pointer_to(tl.where(in_prefix, prefix, tail), like)
    if PAGE > 0:
        return base + page_start(table, cached_row, start, PAGE) * R
    return base + start * R


@jit
def _attend(latent, shared, seen, query, state, scaling, HAS_MASK: tl.constexpr):
    """`state` (largest score, sum of weights, weighted sums of latents [L, HEADS]) with the tokens
    of latent [T, L] and shared [P, T]; of those `seen` [T] alone with HAS_MASK.

    Scores are turned around before their sum. In a chain of products, the compiler would give each
    warp tokens of its own, of which there are too few, and all queries to read.
    """
    largest, total, sums = state
    q_m, q_p = query
    scores = tl.trans(tl.dot(latent, q_m)) + tl.trans(tl.dot(tl.trans(shared), q_p))
    scores *= scaling
    if HAS_MASK:
        scores = tl.where(seen[None, :], scores, -1e30)
    larger = tl.maximum(largest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - larger[:, None])
    if HAS_MASK:
        weights = tl.where(seen[None, :], weights, 0.0)
    shrink = tl.exp2(largest - larger)
    total = total * shrink + tl.sum(weights, axis=1)
    sums *= shrink[None, :]
    sums = tl.dot(tl.trans(latent), tl.trans(weights.to(latent.dtype)), sums)
    return larger, total, sums


@jit
def attend_kernel(
    query,  # [B, H, R]
    table,  # int64, columns of `LatentAddresses`
    counters,  # int64 [B / T, 4], columns of `Counters`; the step's own tokens are cached by now
    real,  # int64 [2]: address of uint8 [B / T, ..], 0 at padding, and its row stride
    mixed,  # [B, SPLITS, H, L], means over a share's tokens, to be written
    weight,  # float32 [B, SPLITS, 2, H]: largest score and sum of weights, to be written
    scaling,  # of the scores, for powers of two
    num_tokens,  # T
    H: tl.constexpr,
    HEADS: tl.constexpr,  # H, or more, a power of two of at least 16
    L: tl.constexpr,
    P: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,  # divides BLOCK
    PAGE: tl.constexpr,  # tokens of a page, a multiple of BLOCK; 0: the cache has no pages
    HAS_PADDING: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Absorbed attention to a share of the cached latents, which lie in a prefix and a tail.

    Whole blocks of both come first, loaded without a mask, which would take registers that there
    are not; then, in pieces, what is left of each.
    """
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    R: tl.constexpr = L + P
    wait(IS_LINKED)
    prefix_tokens = tl.load(table + PREFIX_TOKENS)
    sequence = row // num_tokens
    counters += sequence * COUNTERS
    cached_row = tl.load(counters + ROW)
    tail_tokens = tl.load(counters + CACHED) + row % num_tokens + 1 - prefix_tokens
    size: tl.constexpr = query.dtype.element_ty.primitive_bitwidth // 8
    prefix = tl.load(table + PREFIX) + cached_row * tl.load(table + PREFIX_STRIDE) * size
    tail = tl.load(table + TAIL) + cached_row * tl.load(table + TAIL_STRIDE) * size
    segments = prefix, tail
    prefix_blocks = prefix_tokens // BLOCK
    blocks = prefix_blocks + tail_tokens // BLOCK
    share = tl.maximum(tl.cdiv(blocks, SPLITS), 1)
    first, last = split * share, tl.minimum(split * share + share, blocks)
    prefix_pieces = tl.cdiv(prefix_tokens % BLOCK, PIECE)
    pieces = prefix_pieces + tl.cdiv(tail_tokens % BLOCK, PIECE)
    # programs without blocks come first
    first_piece = (split + SPLITS - tl.cdiv(blocks, share)) % SPLITS
    h, m, p = tl.arange(0, HEADS), tl.arange(0, L), tl.arange(0, P)
    head = h < H
    place = row * SPLITS + split
    weight += place * 2 * H
    if (first >= last) & (first_piece >= pieces):
        tl.store(weight + h, tl.full([HEADS], -1e30, tl.float32), mask=head)
        tl.store(weight + H + h, tl.zeros([HEADS], tl.float32), mask=head)
        return

    is_real = tl.load(real).to(tl.pointer_type(tl.uint8)) + sequence * tl.load(real + 1)
    own = query + (row * H + h[None, :]) * R
    q_m = tl.load(own + m[:, None], mask=head[None, :], other=0.0)
    q_p = tl.load(own + L + p[:, None], mask=head[None, :], other=0.0)
    queries = q_m, q_p
    state = (
        tl.full([HEADS], -1e30, tl.float32),
        tl.zeros([HEADS], tl.float32),
        tl.zeros([L, HEADS], tl.float32),
    )
    t = tl.arange(0, BLOCK)
    for block in range(first, last):
        in_prefix = block < prefix_blocks
        start = tl.where(in_prefix, block, block - prefix_blocks) * BLOCK
        base = _tokens(table, cached_row, segments, in_prefix, start, query, R, PAGE)
        latent = tl.load(base + t[:, None] * R + m[None, :])
        shared = tl.load(base + t[None, :] * R + L + p[:, None])
        seen = t >= 0
        if HAS_PADDING:
            seen = tl.load(is_real + tl.where(in_prefix, 0, prefix_tokens) + start + t) != 0
        state = _attend(latent, shared, seen, queries, state, scaling, HAS_PADDING)

    t = tl.arange(0, PIECE)
    for piece in range(first_piece, pieces, SPLITS):
        in_prefix = piece < prefix_pieces
        tokens = tl.where(in_prefix, prefix_tokens, tail_tokens)
        start = tl.where(in_prefix, piece, piece - prefix_pieces) * PIECE
        start += tokens // BLOCK * BLOCK
        base = _tokens(table, cached_row, segments, in_prefix, start, query, R, PAGE)
        seen = start + t < tokens
        latent = tl.load(base + t[:, None] * R + m[None, :], mask=seen[:, None], other=0.0)
        shared = tl.load(base + t[None, :] * R + L + p[:, None], mask=seen[None, :], other=0.0)
        if HAS_PADDING:
            token = tl.where(in_prefix, 0, prefix_tokens) + start + t
            seen = seen & (tl.load(is_real + token, mask=seen, other=0) != 0)
        state = _attend(latent, shared, seen, queries, state, scaling, True)

    largest, total, sums = state
    out = mixed + (place * H + h[None, :]) * L + m[:, None]
    tl.store(out, sums * (1.0 / tl.maximum(total, 1e-30))[None, :], mask=head[None, :])
    tl.store(weight + h, largest, mask=head)
    tl.store(weight + H + h, total, mask=head)


@jit
def mix_kernel(
    mixed,  # [B, SPLITS, H, L]
    weight,  # float32 [B, SPLITS, 2, H]
    kv_b,  # [H, N + V, L]
    out,  # [B, out_stride], or without HAS_VALUES [B, H, L]
    columns,  # int8 [B, 8, FIXED] and
    wide_columns,  # float16 [B, 4, FIXED] and
    halves,  # int8 [B, 2, FIXED] and
    unit,  # float32 [B, FIXED / 32]: out in fixed point; without FIXED anything
    out_stride,
    FIXED: tl.constexpr,
    H: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    SPLITS: tl.constexpr,
    PLACES: tl.constexpr,  # SPLITS, or more, a power of two
    GROUP: tl.constexpr,  # shares to load at once, a power of two
    BLOCK: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Join the shares of `attend_kernel`, and apply the heads' value matrices."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s, m, g = tl.arange(0, PLACES), tl.arange(0, L), tl.arange(0, GROUP)
    v = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    if HAS_VALUES:  # by columns, as in `kda_kernel`
        weights = tl.load(kv_b + (head * (N + V) + N + v[None, :]) * L + m[:, None])
    wait(IS_LINKED)
    share = weight + row * SPLITS * 2 * H + head
    top = tl.load(share + s * 2 * H, mask=s < SPLITS, other=-1e30)
    total = tl.load(share + s * 2 * H + H, mask=s < SPLITS, other=0.0)
    top_of_all = tl.max(top)
    whole = tl.sum(total * tl.exp2(top - top_of_all))
    used = tl.max(tl.where(total > 0, s + 1, 0))
    sums = tl.zeros([GROUP, L], tl.float32)
    for start in range(0, used, GROUP):
        place = start + g
        there = place < used
        own_top = tl.load(share + place * 2 * H, mask=there, other=-1e30)
        own_total = tl.load(share + place * 2 * H + H, mask=there, other=0.0)
        there = there & (own_total > 0)
        part = mixed + ((row * SPLITS + place[:, None]) * H + head) * L + m[None, :]
        part = tl.load(part, mask=there[:, None], other=0.0)
        sums += part.to(tl.float32) * (own_total * tl.exp2(own_top - top_of_all))[:, None]
    latent = tl.sum(sums, axis=0) / tl.maximum(whole, 1e-30)
    if HAS_VALUES:
        y = tl.sum(weights.to(tl.float32) * latent[:, None], axis=0)
        tl.store(out + row * out_stride + head * V + v, y)
        if FIXED > 0:
            fixed = (columns, wide_columns, halves, unit)
            store_row_fixed_point(y, head * V + v, fixed, row, FIXED)
    else:
        tl.store(out + (row * H + head) * L + m, latent)
