"""Triton kernels of the decode step: projections and norms, and what all its kernels share.

At so few tokens a step is a walk through the weights, and its time is the time to read them. Each
kernel reads its weights once, in long rows, and does around it what would otherwise be kernels of
its own: norms before, activations and residuals after. Tables on the device (`addresses.py`) say
where the cache's tensors lie, so a recorded graph serves any cache. `step.py` has the order of the
launches; `tests/decode/test_decode_step.py` compares each kernel with torch.

Sums are in float32. What passes from kernel to kernel is in the buffers' dtype.

With IS_LINKED, kernels are launched before the ones before them have ended (programmatic dependent
launch, from compute capability 9.0): they may load weights, then `wait`, then touch all else. Since
each lets the next one start before it waits itself, weights of several kernels to come are loaded
while a small one runs; after its wait a kernel sees what all before it have written.

Shapes: B rows (one token each, T of a sequence in turn), D hidden size, N output columns.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.addresses import COUNTERS, LOGGED, KDAAddresses, columns
from kimi_linear.ops.runtime import jit, tl

_, _, LOG, LOG_STRIDE, *_ = columns(KDAAddresses)


@jit
def pointer_to(address, like):
    """A pointer to `address`, of the type of the pointer `like`, aligned to 16 bytes."""
    return tl.multiple_of(tl.multiple_of(address, 16).to(like.dtype), 16)


@jit
def wait(IS_LINKED: tl.constexpr):
    """Let the next kernel start, which may load its weights; wait for all kernels before."""
    if IS_LINKED:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def wait_first(IS_LINKED: tl.constexpr):
    """Wait for all kernels before; then let the next one start, which may at once read what those
    have written."""
    if IS_LINKED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@jit
def norm_scale(square, size, eps):
    """1 / root mean square, from a sum of squares."""
    return 1.0 / tl.sqrt(square / size + eps)


@jit
def log_entry(row, num_tokens, table, counters, like, D: tl.constexpr):
    """Where the log of the cache has a place for a row, of the type of the pointer `like`."""
    sequence = row // num_tokens
    log = tl.load(table + LOG).to(like.dtype) + sequence * tl.load(table + LOG_STRIDE)
    logged = tl.load(counters + sequence * COUNTERS + LOGGED)
    return log + (logged + row % num_tokens) * D


@jit
def own_embedding_kernel(
    ids,  # int64 [B]
    weights,  # [N, D], the embeddings of the ids from `first` on
    out,  # [B, D], to be written
    first,
    N,
    D: tl.constexpr,
    PLACES: tl.constexpr,  # D, or more, a power of two
):
    """The embedding of a row's id, or zeros if it is none of these."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, PLACES)
    place = tl.load(ids + row) - first
    size = tl.where((place >= 0) & (place < N), D, 0)
    x = tl.load(weights + place * D + d, mask=d < size, other=0.0)
    tl.store(out + row * D + d, x, mask=d < D)


@jit
def project_kernel(
    x,  # [B, D], rows of x_stride
    norm,  # [D], or anything without HAS_NORM
    tiles,  # int64 [tiles, 4]: address of the first weight, rows, column of out, 0
    weights,  # [N, D] without HAS_TILES, else any tensor of the weights' dtype
    residual,  # [B, N], rows of out_stride, or anything without HAS_RESIDUAL
    out,  # [B, N], rows of out_stride
    table,  # int64, columns of `KDAAddresses`; its log takes the normed x
    counters,  # int64 [B / T, 4], columns of `Counters`
    x_stride,
    out_stride,
    eps,
    num_tokens,  # T
    N,
    D: tl.constexpr,
    LARGE: tl.constexpr,  # columns of the first part, a power of two
    SMALL: tl.constexpr,  # the others, in a power of two of places; 0: none
    ROWS: tl.constexpr,  # B
    BLOCK: tl.constexpr,
    HAS_TILES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_LOG: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """out = norm(x) @ weights^T + residual, a tile of `BLOCK` columns by program."""
    n, d = tl.arange(0, BLOCK), tl.arange(0, LARGE)
    if HAS_TILES:
        tile = tiles + tl.program_id(0) * 4
        weight = pointer_to(tl.load(tile), weights)
        inside = n < tl.load(tile + 1)
        column = tl.load(tile + 2)
    else:
        column = tl.program_id(0).to(tl.int64) * BLOCK
        weight = weights + column * D
        inside = n < N - column
    w = tl.load(weight + n[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
    if SMALL > 0:
        e = LARGE + tl.arange(0, SMALL)
        rest = e < D
        w_e = tl.load(
            weight + n[:, None] * D + e[None, :], mask=inside[:, None] & rest[None, :], other=0.0
        )
    if HAS_NORM:
        norm_d = tl.load(norm + d).to(tl.float32)
        if SMALL > 0:
            norm_e = tl.load(norm + e, mask=rest, other=0.0).to(tl.float32)
    wait(IS_LINKED)
    for i in tl.static_range(ROWS):
        row = i
        x_d = tl.load(x + row * x_stride + d).to(tl.float32)
        if SMALL > 0:
            x_e = tl.load(x + row * x_stride + e, mask=rest, other=0.0).to(tl.float32)
        if HAS_NORM:
            square = tl.sum(x_d * x_d)
            x_d *= norm_d
            if SMALL > 0:
                square += tl.sum(x_e * x_e)
                x_e *= norm_e
            scale = norm_scale(square, D, eps)
            if HAS_LOG:
                if tl.program_id(0) == 0:
                    if tl.load(table + LOG) != 0:
                        entry = log_entry(row, num_tokens, table, counters, weights, D)
                        tl.store(entry + d, x_d * scale)
                        if SMALL > 0:
                            tl.store(entry + e, x_e * scale, mask=rest)
        y = tl.sum(w.to(tl.float32) * x_d[None, :], axis=1)
        if SMALL > 0:
            y += tl.sum(w_e.to(tl.float32) * x_e[None, :], axis=1)
        if HAS_NORM:
            y *= scale
        place = row * out_stride + column + n
        if HAS_RESIDUAL:
            y += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, y, mask=inside)


@jit
def project_many_kernel(
    x,  # [B, D], rows of x_stride
    tiles,  # int64 [tiles, 4]: address of the first weight, rows, column of out, column of x
    ups,  # int64 [tiles]: addresses of a second matrix's weights, with IS_GATED
    weights,  # any tensor of the weights' dtype
    out,  # [B, N], rows of out_stride
    num_rows,
    x_stride,
    out_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,  # B, or more, a power of two of at least 16
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """out = x @ weights^T, or silu(x @ weights^T) * (x @ ups^T); a tile of columns by program."""
    n, d, row = tl.arange(0, BLOCK), tl.arange(0, STEP), tl.arange(0, ROWS)
    tile = tiles + tl.program_id(0) * 4
    weight = pointer_to(tl.load(tile), weights) + n[None, :] * D
    up = (
        pointer_to(tl.load(ups + tl.program_id(0)), weights) + n[None, :] * D
        if IS_GATED
        else weight
    )
    inside = n < tl.load(tile + 1)
    column = tl.load(tile + 2)
    x += tl.multiple_of(tl.load(tile + 3), 8)
    wait(IS_LINKED)
    y = tl.zeros([ROWS, BLOCK], tl.float32)
    up_y = tl.zeros([ROWS, BLOCK], tl.float32)
    live = row < num_rows
    for start in range(0, D, STEP):
        k = start + d
        a = x + row[:, None] * x_stride + k[None, :]
        a = tl.load(a, mask=live[:, None] & (k < D)[None, :], other=0.0)
        both = (k < D)[:, None] & inside[None, :]
        y = tl.dot(a, tl.load(weight + k[:, None], mask=both, other=0.0), y)
        if IS_GATED:
            up_y = tl.dot(a, tl.load(up + k[:, None], mask=both, other=0.0), up_y)
    if IS_GATED:
        y = y * tl.sigmoid(y) * up_y
    place = row[:, None].to(tl.int64) * out_stride + column + n[None, :]
    tl.store(out + place, y, mask=live[:, None] & inside[None, :])


@jit
def summed(hidden, parts, row, d, inside, D: tl.constexpr, PARTS: tl.constexpr):
    """float32 [places]: a row of hidden [B, D] and its parts [B, PARTS, D]."""
    x = tl.load(hidden + row * D + d, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(PARTS):
        part = tl.load(parts + (row * PARTS + i) * D + d, mask=inside, other=0.0)
        x += part.to(tl.float32)
    return x


@jit
def add_parts(hidden, parts, row, d, inside, D: tl.constexpr, PARTS: tl.constexpr):
    """float32 [places]: a row of hidden [B, D] after adding its parts [B, PARTS, D]."""
    x = summed(hidden, parts, row, d, inside, D, PARTS)
    if PARTS > 0:
        tl.debug_barrier()  # small rows are held by several threads, all of which must have read
        tl.store(hidden + row * D + d, x, mask=inside)
    return x


@jit
def log_normed(x, d, inside, row, num_tokens, table, counters, like, D: tl.constexpr):
    """Write a normed row to the log of the cache, if it has one, in the dtype of `like`."""
    if tl.load(table + LOG) != 0:
        tl.store(log_entry(row, num_tokens, table, counters, like, D) + d, x, mask=inside)


@jit
def add_norm_kernel(
    hidden,  # [B, D], added to
    parts,  # [B, PARTS, D]
    norm,  # [D]
    out,  # [B, D], to be written
    table,  # int64, columns of `KDAAddresses`; its log takes the normed rows
    counters,  # int64 [B / T, 4], columns of `Counters`
    eps,
    num_tokens,  # T
    D: tl.constexpr,
    PLACES: tl.constexpr,  # D, or more, a power of two
    PARTS: tl.constexpr,
    HAS_LOG: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """hidden += sum of parts; out = norm(hidden); a row by program."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PLACES)
    inside = d < D
    wait(IS_LINKED)
    x = add_parts(hidden, parts, row, d, inside, D, PARTS)
    x *= norm_scale(tl.sum(x * x), D, eps)
    x *= tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + d, x, mask=inside)
    if HAS_LOG:
        log_normed(x, d, inside, row, num_tokens, table, counters, out, D)
