"""Triton kernels that write inputs of few rows in fixed point: integers of 16 bits, scaled so that
the largest one beside them is 32,512, as a high and a low half of 8 bits.

`fixed_product_kernels.py` multiplies by them, and says why they are written more than once:
`halves`, for weights of 3 bits, has the first and the second 128 inputs of a block of 256 in the
lower and upper bytes of its words; `columns` has four runs of 32 inputs as they lie side by side in
a tile of 128 bytes (`ops/packed/codes.py`), each run in columns of its own, which are 0 in the
places of the other three. Nothing is ever written there. `wide_columns` are the same
numbers in float16, unhalved, for weights in float8. What no weight wants is None.

Shapes: B rows (one token each), T of them at once, D hidden size, P inputs in whole blocks of 256,
R = P / 32.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.projection_kernels import add_parts, log_normed, norm_scale, summed, wait
from kimi_linear.ops.runtime import jit, tl


@jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def largest(x, axis: tl.constexpr):
    """The largest number's size; NaN where there is any."""
    return tl.reduce(tl.abs(x), axis, _larger)


@jit
def store_fixed_point(
    x,  # float32 [places, T]
    size,  # float32 [T], the largest number's
    d,  # [places], a whole number of runs
    inside,  # [places, T]
    out,  # columns int8 [B, 8, P], wide columns float16 [B, 4, P], halves int8 [B, 2, P] and unit
    # float32 [B, R]
    row,  # int64 [T]
    P: tl.constexpr,
):
    """Write inputs of rows in fixed point. What is not finite makes their unit so."""
    columns, wide_columns, halves, unit = out
    size = size / 32512.0 + 1e-30
    x = x / size[None, :]
    number = tl.floor(x + 0.5).to(tl.int32)
    high = (number + 128) >> 8
    low = number - high * 256
    run = d // 32 % 4
    place = d // 128 * 128 + d % 32 * 4 + run
    if wide_columns is not None:
        column = (row * 4)[None, :] * P + (P * run + place)[:, None]
        tl.store(wide_columns + column, x.to(tl.float16), mask=inside)
    for half in tl.static_range(2):
        value = (high if half == 0 else low).to(tl.int8)
        if columns is not None:
            column = (row * 8 + half)[None, :] * P + (2 * P * run + place)[:, None]
            tl.store(columns + column, value, mask=inside)
        if halves is not None:
            own = d // 256 * 256 + d % 128 * 2 + d % 256 // 128
            tl.store(halves + (row * 2 + half)[None, :] * P + own[:, None], value, mask=inside)
    is_first = (d % 32 == 0)[:, None] & inside
    target = unit + row[None, :] * (P // 32) + (d // 32)[:, None]
    tl.store(target, tl.broadcast_to(size[None, :], x.shape), mask=is_first)


@jit
def store_row_fixed_point(x, d, out, row, P: tl.constexpr):
    """As `store_fixed_point`, of one row: all numbers of x [places]."""
    x, row = x[:, None], tl.zeros([1], tl.int64) + row
    size = tl.zeros([1], tl.float32) + largest(x, 0)
    store_fixed_point(x, size, d, (d >= 0)[:, None], out, row, P)


@jit
def _store_normed(
    x,  # float32 [places], the weighted row, less its scale
    scale,
    out,  # [B, D]
    fixed,  # of `store_fixed_point`
    row,
    d,
    inside,
    D: tl.constexpr,
    P: tl.constexpr,
):
    """Write a normed row, also in fixed point: float32 [places]."""
    size = tl.zeros([1], tl.float32) + largest(x, 0) * scale
    x *= scale
    tl.store(out + row * D + d, x, mask=inside)
    place = tl.zeros([1], tl.int64) + row
    store_fixed_point(x[:, None], size, d, inside[:, None], fixed, place, P)
    return x


@jit
def add_norm_fixed_kernel(
    hidden,  # [B, D], added to
    parts,  # [B, PARTS, D]
    norm,  # [D]
    out,  # [B, D], to be written
    columns,  # int8 [B, 8, P] and
    wide_columns,  # float16 [B, 4, P] and
    halves,  # int8 [B, 2, P] and
    unit,  # float32 [B, R], alike
    table,  # int64, columns of `KDAAddresses`; its log takes the normed rows
    counters,  # int64 [B / T, 4], columns of `Counters`
    eps,
    num_tokens,  # T
    D: tl.constexpr,
    P: tl.constexpr,
    PLACES: tl.constexpr,  # D, or more, a power of two
    PARTS: tl.constexpr,
    HAS_LOG: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """hidden += sum of parts; out = norm(hidden), also in fixed point; a row by program."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PLACES)
    inside = d < D
    weight = tl.load(norm + d, mask=inside, other=0.0).to(tl.float32)
    wait(IS_LINKED)
    x = add_parts(hidden, parts, row, d, inside, D, PARTS)
    scale = norm_scale(tl.sum(x * x), D, eps)
    fixed = (columns, wide_columns, halves, unit)
    x = _store_normed(x * weight, scale, out, fixed, row, d, inside, D, P)
    if HAS_LOG:
        log_normed(x, d, inside, row, num_tokens, table, counters, out, D)


@jit
def add_norm_score_kernel(
    hidden,  # [B, D]
    parts,  # [B, PARTS, D]
    norm,  # [D]
    router,  # [E, D]
    sums,  # [B, D], to be written, not `hidden`: other programs read that
    out,  # [B, D], to be written
    columns,  # int8 [B, 8, P] and
    wide_columns,  # float16 [B, 4, P] and
    halves,  # int8 [B, 2, P] and
    unit,  # float32 [B, R], alike
    logits,  # float32 [B, E], to be written
    eps,
    E,
    D: tl.constexpr,
    P: tl.constexpr,
    PLACES: tl.constexpr,  # D, or more, a power of two
    LARGE: tl.constexpr,  # columns of the first part, a power of two
    SMALL: tl.constexpr,  # the others, in a power of two of places; 0: none
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,  # B
    BLOCK: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """sums = hidden + sum of parts; out = norm(sums), also in fixed point, a row by program; and in
    other programs logits = norm(sums) @ router^T, a tile of `BLOCK` experts by program.
    """
    if tl.program_id(0) < ROWS:
        row = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, PLACES)
        inside = i < D
        weight = tl.load(norm + i, mask=inside, other=0.0).to(tl.float32)
        wait(IS_LINKED)
        x = summed(hidden, parts, row, i, inside, D, PARTS)
        tl.store(sums + row * D + i, x, mask=inside)
        scale = norm_scale(tl.sum(x * x), D, eps)
        fixed = (columns, wide_columns, halves, unit)
        _store_normed(x * weight, scale, out, fixed, row, i, inside, D, P)
        return
    n = (tl.program_id(0) - ROWS) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, LARGE)
    all_d = d < D
    is_expert = (n < E)[:, None]
    w = tl.load(router + n[:, None] * D + d[None, :], mask=is_expert, other=0.0)
    norm_d = tl.load(norm + d).to(tl.float32)
    if SMALL > 0:
        e = LARGE + tl.arange(0, SMALL)
        rest = e < D
        w_e = tl.load(
            router + n[:, None] * D + e[None, :], mask=is_expert & rest[None, :], other=0.0
        )
        norm_e = tl.load(norm + e, mask=rest, other=0.0).to(tl.float32)
    wait(IS_LINKED)
    for i in tl.static_range(ROWS):
        x_d = summed(hidden, parts, i, d, all_d, D, PARTS)
        square = tl.sum(x_d * x_d)
        y = tl.sum(w.to(tl.float32) * (x_d * norm_d)[None, :], axis=1)
        if SMALL > 0:
            x_e = summed(hidden, parts, i, e, rest, D, PARTS)
            square += tl.sum(x_e * x_e)
            y += tl.sum(w_e.to(tl.float32) * (x_e * norm_e)[None, :], axis=1)
        tl.store(logits + i * E + n, y * norm_scale(square, D, eps), mask=n < E)
