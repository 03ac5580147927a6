"""Triton kernel of the decode step for packed weights: dense products of any number of rows.

Weights are the left operand of the tensor cores' products, taken apart in registers; tokens are the
narrow right one, of at least 8 columns. See `ops/packed/kernels.py` for words, and
`projection_kernels.py` for IS_LINKED. `fixed_product_kernels.py` has few rows' own products.

Shapes: B rows (one token each), N outputs, K inputs, W words of a row, V rows and M columns
(tokens) of a tile.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.expert_kernels import gated
from kimi_linear.decode.projection_kernels import pointer_to, wait
from kimi_linear.ops.packed.kernels import add_products, block_values, load_scales, load_words
from kimi_linear.ops.runtime import jit, tl


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
    SHARE: tl.constexpr,  # blocks
    V: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # no block reaches beyond the limit
    FORM: tl.constexpr,
):
    """float32 [V, M]: a share of the rows' blocks by the columns."""
    BLOCKS: tl.constexpr = (K + 255) // 256
    total = tl.zeros([V, M], tl.float32)
    for i in range(SHARE):
        block = tl.minimum(first + i, BLOCKS - 1)
        words, upper = load_words(low, high, block, FORM)
        scales = load_scales(scale, zero, block, stride, K, FORM)
        values = block_values(words, upper, scales, block, FORM, x.dtype.element_ty)
        total = add_products(total, values, x, first + i, limit, IS_WHOLE)
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
    IS_GATED: tl.constexpr,
    HAS_PLAIN: tl.constexpr,
    FORM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """out = x @ weights^T, or silu(x @ weights^T) * (x @ ups^T); splits of a sum side by side."""
    BLOCKS: tl.constexpr = (K + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if FORM[0] == 8 else 32)
    SHARE: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    IS_WHOLE: tl.constexpr = SHARE * SPLITS * 256 == K
    first = tl.program_id(1) * SHARE
    limit = tl.minimum((first + SHARE) * 256, K)
    tile = tiles + tl.program_id(0) * 8
    size = tl.load(tile + 6)
    row = tl.load(tile + 5) + tl.minimum(tl.arange(0, V), size - 1)
    token = tl.program_id(2) * M + tl.arange(0, M)
    address = x + tl.minimum(token, num_rows - 1) * x_stride
    is_plain = tl.load(tile + 2) == 0
    total = tl.zeros([V, M], tl.float32)
    for i in tl.static_range(2 if IS_GATED else 1):
        source = tile if i == 0 else ups + tl.program_id(0) * 8
        low = pointer_to(tl.load(source), words) + row * WORDS
        high = pointer_to(tl.load(source + 1), uppers) + row * WORDS
        scale = tl.load(source + 2).to(scales.dtype) + row // FORM[5]
        zero = tl.load(source + 3).to(zeros.dtype) + row // FORM[5]
        if i == 0:
            wait(IS_LINKED)
        y = tl.zeros([V, M], tl.float32)
        if HAS_PLAIN:
            if is_plain:
                weight = pointer_to(tl.load(source), x) + row * K
                y = plain_product(weight, address, first * 256, limit, V, M, K, 64)
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
                K,
                IS_WHOLE,
                FORM,
            )
        total = y if i == 0 else gated(total, y)
    n, token = tl.arange(0, V)[:, None], token[None, :]
    target = out + token.to(tl.int64) * out_stride + tl.program_id(1) * split_stride
    tl.store(target + tl.load(tile + 7) + n, total, mask=(token < num_rows) & (n < size))
