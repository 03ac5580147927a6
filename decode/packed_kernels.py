"""Triton kernels of the decode step for packed weights: dense products, and what both expert
products (`packed_expert_kernels.py`) share with them.

Weights are the left operand of the tensor cores' products, taken apart in registers; tokens are the
narrow right one, of at least 8 columns. See `ops/packed/kernels.py` for words, and
`projection_kernels.py` for IS_LINKED.

With fewer tokens than columns, a row's inputs are cut into PARTS, and each part becomes a row of
the tile by itself: parts times rows by parts times tokens. What a part of a row gives with its own
inputs is kept and added up, what it gives with those of other parts is not. So a few tokens keep as
many threads busy as many do, and the products cost nothing that would not be computed anyway.

Shapes: B rows (one token each), D hidden size, N outputs, K inputs, W words of a row, E experts,
I expert width, V = PARTS * N rows and M columns of a tile, T = M / PARTS tokens of it.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.expert_kernels import gated
from kimi_linear.decode.projection_kernels import pointer_to, wait
from kimi_linear.ops.packed.kernels import add_products, block_values, load_scales, load_words
from kimi_linear.ops.runtime import jit, tl


@jit
def row_of(V: tl.constexpr, PARTS: tl.constexpr):
    """[V]: which of a tile's outputs each of its rows belongs to."""
    return tl.arange(0, V) % (V // PARTS)


@jit
def token_of(M: tl.constexpr, PARTS: tl.constexpr):
    """[M]: which of a tile's tokens each of its columns belongs to."""
    return tl.arange(0, M) // PARTS


@jit
def sum_parts(total, is_plain, V: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr):
    """[V, M] to [N, T]: what parts give with their own inputs; of plain weights, whose inputs have
    no parts, the first of all equal ones."""
    if PARTS == 1:
        return total
    else:
        row_part = tl.arange(0, V)[:, None] // (V // PARTS)
        column_part = tl.arange(0, M)[None, :] % PARTS
        own = (row_part == column_part) & ((row_part == 0) | (is_plain == 0))
        by_token = tl.reshape(tl.where(own, total, 0.0), [V, M // PARTS, PARTS])
        by_part = tl.reshape(tl.sum(by_token, axis=2), [PARTS, V // PARTS, M // PARTS])
        return tl.sum(by_part, axis=0)


@jit
def blocks(first, SHARE: tl.constexpr, V: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr):
    """The first block of each row [V] and column [M] of a tile; without parts, one for all."""
    if PARTS == 1:
        return first, first
    else:
        rows = first + tl.arange(0, V) // (V // PARTS) * SHARE
        return rows, first + tl.arange(0, M) % PARTS * SHARE


@jit
def product(
    low,  # pointers [V] to rows' first words, and
    high,  # of 3 bits, to their high bits
    scale,  # pointers [V] to the first words of scales and
    zero,  # zeros
    x,  # pointers [M] to columns' first inputs
    stride,  # from one word of scales to the next
    first,  # block
    limit,  # inputs from here on are another program's
    SHARE: tl.constexpr,  # blocks of a part
    V: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # no block of a part reaches beyond the limit
    FORM: tl.constexpr,
):
    """float32 [V, M]: a share of the rows' blocks by the columns."""
    BLOCKS: tl.constexpr = (K + 255) // 256
    total = tl.zeros([V, M], tl.float32)
    row_block, column_block = blocks(first, SHARE, V, M, PARTS)
    for i in range(SHARE):
        block = tl.minimum(row_block + i, BLOCKS - 1)
        words, upper = load_words(low, high, block, FORM)
        scales = load_scales(scale, zero, block, stride, K, FORM)
        values = block_values(words, upper, scales, block, FORM, x.dtype.element_ty)
        total = add_products(total, values, x, column_block + i, limit, IS_WHOLE)
    return total


@jit
def _plain_product(
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
def prefetch(low, first, SHARE: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr):
    """Have the second-level cache fetch rows' words, while kernels before this one still run."""
    BLOCKS: tl.constexpr = (K + 255) // 256
    SIZE: tl.constexpr = 64 if FORM[0] == 8 else 32
    if FORM[6]:
        for i in range(SHARE):
            for half in tl.static_range(SIZE // 32):
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                    "=r,l",
                    [low + tl.minimum(first + i, BLOCKS - 1) * SIZE + half * 32],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )


@jit
def packed_project_kernel(
    x,  # [B, K], rows of x_stride
    tiles,  # int64 [tiles, 8]: addresses of codes, high bits, scales and zeros (of a plain weight:
    # of the weight, and 0 for the others), words of scales from one to the next, first row, rows,
    # column of out
    ups,  # int64 [tiles, 8], of a second matrix, with IS_GATED
    words,  # any tensors of these dtypes
    uppers,
    scales,
    zeros,
    out,  # [B, SPLITS, N], rows of out_stride, splits of split_stride
    num_rows,
    x_stride,
    out_stride,
    split_stride,
    K: tl.constexpr,
    SPLITS: tl.constexpr,  # of the inputs, each a program's
    V: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_PLAIN: tl.constexpr,
    FORM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """out = x @ weights^T, or silu(x @ weights^T) * (x @ ups^T); splits of a sum side by side."""
    BLOCKS: tl.constexpr = (K + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if FORM[0] == 8 else 32)
    SPLIT: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    SHARE: tl.constexpr = (SPLIT + PARTS - 1) // PARTS
    IS_WHOLE: tl.constexpr = SHARE * PARTS * SPLITS * 256 == K
    first = tl.program_id(1) * SPLIT
    limit = tl.minimum((first + SPLIT) * 256, K)
    tile = tiles + tl.program_id(0) * 8
    size = tl.load(tile + 6)
    row = tl.load(tile + 5) + tl.minimum(row_of(V, PARTS), size - 1)
    token = tl.program_id(2) * (M // PARTS) + token_of(M, PARTS)
    address = x + tl.minimum(token, num_rows - 1) * x_stride
    is_plain = tl.load(tile + 2) == 0
    row_block, _ = blocks(first, SHARE, V, M, PARTS)
    total = tl.zeros([V // PARTS, M // PARTS], tl.float32)
    for i in tl.static_range(2 if IS_GATED else 1):
        source = tile if i == 0 else ups + tl.program_id(0) * 8
        low = pointer_to(tl.load(source), words) + row * WORDS
        high = pointer_to(tl.load(source + 1), uppers) + row * WORDS
        scale = tl.load(source + 2).to(scales.dtype) + row // FORM[5]
        zero = tl.load(source + 3).to(zeros.dtype) + row // FORM[5]
        if i == 0:
            if IS_LINKED:
                if not is_plain:
                    prefetch(low, row_block, SHARE, K, FORM)
            wait(IS_LINKED)
        y = tl.zeros([V, M], tl.float32)
        if HAS_PLAIN:
            if is_plain:
                weight = pointer_to(tl.load(source), x) + row * K
                y = _plain_product(weight, address, first * 256, limit, V, M, K, 64)
        if not is_plain:
            stride = tl.load(source + 4)
            y = product(
                low,
                high,
                scale,
                zero,
                address,
                stride,
                first,
                limit,
                SHARE,
                V,
                M,
                PARTS,
                K,
                IS_WHOLE,
                FORM,
            )
        y = sum_parts(y, is_plain, V, M, PARTS)
        if i == 0:
            total = y
        else:
            total = gated(total, y)
    n = tl.arange(0, V // PARTS)[:, None]
    token = tl.program_id(2) * (M // PARTS) + tl.arange(0, M // PARTS)[None, :]
    target = out + token.to(tl.int64) * out_stride + tl.program_id(1) * split_stride
    tl.store(target + tl.load(tile + 7) + n, total, mask=(token < num_rows) & (n < size))
