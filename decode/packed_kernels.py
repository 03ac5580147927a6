"""Triton kernels of the decode step for packed weights: dense products and both expert products.

Weights are the left operand of the tensor cores' products, taken apart in registers; tokens are the
narrow right one, of at least 8 columns. See `ops/packed/kernels.py` for words, and
`projection_kernels.py` for IS_LINKED.

Shapes: B rows (one token each), D hidden size, N outputs, K inputs, W words of a row, G groups of a
row, E experts, I expert width, M columns (tokens) of a tile.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.expert_kernels import gated, program_expert
from kimi_linear.decode.projection_kernels import pointer_to, wait
from kimi_linear.ops.packed.kernels import add_products, block_values, load_scales, load_words
from kimi_linear.ops.runtime import jit, tl


@jit
def packed_product(
    low,  # pointers [N] to rows' first words, and
    high,  # of 3 bits, to their high bits
    scale,  # pointers [N] to the first words of scales and
    zero,  # zeros
    x,  # pointers [M] to columns' first inputs
    stride,  # from one word of scales to the next
    first,  # block, and
    last,  # beyond it
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    ASM: tl.constexpr,
):
    """float32 [N, M]: some blocks of the rows by the columns."""
    total = tl.zeros([N, M], tl.float32)
    for block in range(first, last):
        words, upper = load_words(low[:, None], high[:, None], block, BITS)
        scales = load_scales(scale, zero, block, stride, K, GROUP, HAS_ZERO, SCALE)
        values = block_values(
            words,
            upper,
            scales,
            block,
            BITS,
            GROUP,
            IS_FLOAT,
            HAS_ZERO,
            SCALE,
            ASM,
            x.dtype.element_ty,
        )
        total = add_products(total, values, x[None, :], block, K)
    return total


@jit
def plain_product(
    weight, x, first, last, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr
):
    """float32 [N, M]: inputs from `first` to `last` of 16-bit rows by the columns."""
    total = tl.zeros([N, M], tl.float32)
    for start in range(first, last, STEP):
        k = start + tl.arange(0, STEP)
        w = tl.load(weight[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0)
        a = tl.load(x[None, :] + k[:, None], mask=(k < K)[:, None], other=0.0)
        total = tl.dot(w, a, total)
    return total


@jit
def prefetch(low, first, last, WORDS: tl.constexpr, ASM: tl.constexpr):
    """Have the second-level cache fetch rows' words, while kernels before this one still run."""
    if ASM:
        for block in range(first, last):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                "=r,l",
                [low + block * WORDS],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@jit
def _pointers(like, address):
    return address.to(tl.pointer_type(like.dtype.element_ty))


@jit
def packed_project_kernel(
    x,  # [B, K], rows of x_stride
    tiles,  # int64 [tiles, 8]: addresses of codes, high bits, scales and zeros (of a plain weight:
    # of its first row, and 0 for the others), scale_stride, first row, rows, column of out
    ups,  # int64 [tiles, 8], of a second matrix, with IS_GATED
    words,  # any tensors of these dtypes
    uppers,
    scales,
    zeros,
    out,  # [B, PARTS, N], rows of out_stride, parts of part_stride
    num_rows,
    x_stride,
    out_stride,
    part_stride,
    K: tl.constexpr,
    SHARED: tl.constexpr,  # rows that share a scale
    PARTS: tl.constexpr,  # of the inputs, each a program's
    N: tl.constexpr,  # of a tile
    M: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_PLAIN: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    ASM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """out = x @ weights^T, or silu(x @ weights^T) * (x @ ups^T); parts of a sum side by side."""
    BLOCKS: tl.constexpr = (K + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if BITS == 8 else 32)
    SHARE: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS
    part = tl.program_id(1)
    first = part * SHARE
    last = tl.minimum(first + SHARE, BLOCKS)
    tile = tiles + tl.program_id(0) * 8
    place = tl.arange(0, N)
    size = tl.load(tile + 6)
    row = tl.load(tile + 5) + tl.minimum(place, size - 1)
    column = tl.program_id(2) * M + tl.arange(0, M)
    inside = column < num_rows
    address = x + tl.minimum(column, num_rows - 1) * x_stride
    is_packed = tl.load(tile + 2) != 0
    total = tl.zeros([N, M], tl.float32)
    for i in tl.static_range(2 if IS_GATED else 1):
        source = tile if i == 0 else ups + tl.program_id(0) * 8
        if HAS_PLAIN and not is_packed:
            weight = pointer_to(tl.load(source), x) + row * K
            if i == 0:
                wait(IS_LINKED)
            y = plain_product(weight, address, first * 256, last * 256, N, M, K, 64)
        else:
            low = pointer_to(tl.load(source), words) + row * WORDS
            high = pointer_to(tl.load(source + 1), uppers) + row * WORDS
            scale = _pointers(scales, tl.load(source + 2)) + row // SHARED
            zero = _pointers(zeros, tl.load(source + 3)) + row // SHARED
            if i == 0:
                prefetch(low, first, last, WORDS // BLOCKS, ASM and IS_LINKED)
                wait(IS_LINKED)
            y = packed_product(
                low,
                high,
                scale,
                zero,
                address,
                tl.load(source + 4),
                first,
                last,
                N,
                M,
                K,
                BITS,
                GROUP,
                IS_FLOAT,
                HAS_ZERO,
                SCALE,
                ASM,
            )
        total = y if i == 0 else gated(total, y)
    target = out + column[None, :].to(tl.int64) * out_stride + part * part_stride
    target += tl.load(tile + 7) + place[:, None]
    tl.store(target, total, mask=inside[None, :] & (place < size)[:, None])


@jit
def _group(experts, begin, active, IS_SORTED: tl.constexpr):
    """The expert of this program, and where its pairs start and stop."""
    if IS_SORTED:
        return program_expert(begin, active)
    else:  # a pair by program
        pair = tl.program_id(1)
        return tl.load(experts + pair), pair, pair + 1


@jit
def packed_in_kernel(
    x,  # [B, D], normed
    experts,  # int32 [B * TOP], without IS_SORTED
    order,  # int32 [B * TOP] and
    begin,  # int32 [E + 1] and
    active,  # int32 [E + 1], see `group_kernel`
    low,  # [E, 2 * I, W] and
    high,  # of 3 bits [E, 2 * I, W]
    scale,  # int32 [E, G / P, 2 * I / SHARED] and
    zero,  # alike
    out,  # [B * TOP, I]
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    SCALE_WORDS: tl.constexpr,  # G / P of scales and
    ZERO_WORDS: tl.constexpr,  # zeros
    SHARED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    IS_SORTED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    ASM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """silu(gate) * up of the rows that chose an expert, a tile of an expert by program."""
    BLOCKS: tl.constexpr = (D + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if BITS == 8 else 32)
    STRIDE: tl.constexpr = (2 * I + SHARED - 1) // SHARED
    wait(IS_LINKED)
    expert, start, stop = _group(experts, begin, active, IS_SORTED)
    n = tl.program_id(0) * N + tl.arange(0, N)
    gate_row = tl.minimum(n, I - 1)
    place = expert.to(tl.int64) * 2 * I + gate_row
    scale += expert.to(tl.int64) * SCALE_WORDS * STRIDE
    zero += expert.to(tl.int64) * ZERO_WORDS * STRIDE
    scales, up_scales = gate_row // SHARED, (gate_row + I) // SHARED
    for done in range(start, stop, M):
        there = done + tl.arange(0, M) < stop
        pair = done + tl.arange(0, M)
        if IS_SORTED:
            pair = tl.load(order + pair, mask=there, other=0)
        else:
            pair = tl.where(there, pair, start)
        row = x + (pair // TOP) * D
        gate = tl.zeros([N, M], tl.float32)
        up = tl.zeros([N, M], tl.float32)
        for block in range(BLOCKS):
            words = place[:, None] * WORDS
            gate_w, gate_h = load_words(low + words, high + words, block, BITS)
            words += I * WORDS
            up_w, up_h = load_words(low + words, high + words, block, BITS)
            gate_s = load_scales(
                scale + scales, zero + scales, block, STRIDE, D, GROUP, HAS_ZERO, SCALE
            )
            up_s = load_scales(
                scale + up_scales, zero + up_scales, block, STRIDE, D, GROUP, HAS_ZERO, SCALE
            )
            values = block_values(
                gate_w,
                gate_h,
                gate_s,
                block,
                BITS,
                GROUP,
                IS_FLOAT,
                HAS_ZERO,
                SCALE,
                ASM,
                x.dtype.element_ty,
            )
            gate = add_products(gate, values, row[None, :], block, D)
            values = block_values(
                up_w,
                up_h,
                up_s,
                block,
                BITS,
                GROUP,
                IS_FLOAT,
                HAS_ZERO,
                SCALE,
                ASM,
                x.dtype.element_ty,
            )
            up = add_products(up, values, row[None, :], block, D)
        mask = (n < I)[:, None] & there[None, :]
        tl.store(out + pair[None, :].to(tl.int64) * I + n[:, None], gated(gate, up), mask=mask)


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
    scale,  # int32 [E, G / P, D / SHARED] and
    zero,  # alike
    out,  # [B, PARTS, D], the first TOP parts of each row
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    TOP: tl.constexpr,
    PARTS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    ZERO_WORDS: tl.constexpr,
    SHARED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    IS_SORTED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    SCALE: tl.constexpr,
    ASM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """Weighted outputs of the pairs of an expert, a tile of an expert by program."""
    BLOCKS: tl.constexpr = (I + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if BITS == 8 else 32)
    STRIDE: tl.constexpr = (D + SHARED - 1) // SHARED
    wait(IS_LINKED)
    expert, start, stop = _group(experts, begin, active, IS_SORTED)
    n = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.minimum(n, D - 1)
    place = (expert.to(tl.int64) * D + row) * WORDS
    scale += expert.to(tl.int64) * SCALE_WORDS * STRIDE
    zero += expert.to(tl.int64) * ZERO_WORDS * STRIDE
    scales = row // SHARED
    for done in range(start, stop, M):
        there = done + tl.arange(0, M) < stop
        pair = done + tl.arange(0, M)
        if IS_SORTED:
            pair = tl.load(order + pair, mask=there, other=0)
        else:
            pair = tl.where(there, pair, start)
        y = packed_product(
            low + place,
            high + place,
            scale + scales,
            zero + scales,
            x + pair * I,
            STRIDE,
            0,
            BLOCKS,
            N,
            M,
            I,
            BITS,
            GROUP,
            IS_FLOAT,
            HAS_ZERO,
            SCALE,
            ASM,
        )
        y *= tl.load(weights + pair)[None, :]
        part = pair // TOP * PARTS + pair % TOP
        mask = (n < D)[:, None] & there[None, :]
        tl.store(out + part[None, :].to(tl.int64) * D + n[:, None], y, mask=mask)
