"""Triton kernels of the decode step of few rows: packed weights by inputs in fixed point.

The tensor cores multiply integer codes as they lie in memory by inputs that are integers too,
halves of 8 bits (`fixed_point_kernels.py`). Sums are exact, and groups' scales multiply the sums,
not the weights, so that a weight costs about one instruction. Codes in float8 are widened to
float16, and so are their inputs.

A tile of 128 bytes holds four runs of 32 inputs side by side (`ops/packed/codes.py`). Each run has
columns of its own, since its scale may be its own: a token takes eight columns, a high and a low
half by run, as many as the tensor cores multiply at once; of float8, four. Words of 3 bits hold
all eight runs of a block, which are taken apart into tiles of their own; their inputs come in words
too, of the first four runs and the others.

Values of 3 and 4 bits stand in the upper bits of a byte: they are 32 and 16 times what they mean.

FORM, IS_LINKED: see `ops/packed/kernels.py`, `projection_kernels.py`. `x` and `out` in fixed point
are tuples, see `store_fixed_point`.

Shapes: B rows (one token each), K inputs, P inputs in whole blocks of 256, R = P / 32; of a tile V
weights' rows, T tokens, M columns.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.decode.expert_kernels import gated
from kimi_linear.decode.packed_kernels import plain_product
from kimi_linear.decode.projection_kernels import pointer_to, wait
from kimi_linear.ops.packed.kernels import AND_XOR, constant
from kimi_linear.ops.runtime import constexpr_function, jit, tl


def _threes_asm() -> str:
    """PTX that takes four words of 3-bit codes and their high bits apart into a value in each byte,
    for each of eight slots."""
    lines = ["{ .reg .b32 t, u, a0, a1;"]
    lines += ["prmt.b32 a0, $8, $9, 0x6420; prmt.b32 a1, $8, $9, 0x7531;"]
    for slot in range(8):
        shift = 5 - 2 * (slot % 4)
        move = f"shl.b32 t, a{slot // 4}, {shift};" if shift > 0 else f"shr.b32 t, a{slot // 4}, 1;"
        lines.append(f"{move} shl.b32 u, $10, {7 - slot};")
        lines.append(f"lop3.b32 u, u, 0x80808080, 0x80808080, {AND_XOR};")
        lines.append(f"lop3.b32 ${slot}, t, 0x60606060, u, {AND_XOR};")
    return " ".join([*lines, "}"])


_FOUR = f"0xF0F0F0F0, 0x80808080, {AND_XOR};"
EIGHTS = constant("xor.b32 $0, $1, 0x80808080;")
FOURS = constant(
    f"{{ .reg .b32 t; shl.b32 t, $2, 4; lop3.b32 $0, t, {_FOUR} lop3.b32 $1, $2, {_FOUR} }}"
)
BYTES = constant("prmt.b32 $0, $2, $3, 0x6420; prmt.b32 $1, $2, $3, 0x7531;")
THREES = constant(_threes_asm())
THREES_OUT = constant("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r")


@constexpr_function
def _columns_of(tokens, is_float):
    """M: columns of a tile."""
    return max(8, 4 * tokens) if is_float else 8 * tokens


@jit
def _run_of(M: tl.constexpr, FORM: tl.constexpr):
    """[M]: which of four runs a column is for."""
    return tl.arange(0, M) % 4 if FORM[2] else tl.arange(0, M) % 8 // 2


@jit
def _factors(
    scale,  # pointers [V] to the first groups' words of scales
    unit,  # pointers [M] to the first runs' units
    block,
    stride,  # from one word of a row to the next
    M: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
):
    """What both tiles' sums are multiplied by, in units of x: float32 [V, M] each."""
    found = ()
    for i in tl.static_range(2):
        tile = block * 2 + i
        units = tl.load(unit + tile * 4 + _run_of(M, FORM))[None, :]
        numbers = _of_groups(scale, tile, stride, FORM[4], M, K, FORM)
        found = found + (numbers.to(tl.float32) * units,)
    return found


@jit
def _of_group(numbers, group, stride, dtype: tl.constexpr, GROUPS: tl.constexpr):
    """Scales or zeros of these groups, a load for each."""
    PER_WORD: tl.constexpr = 1 if tl.float32 == dtype else 2
    group = tl.minimum(group, GROUPS - 1)
    place = group // PER_WORD * (stride * PER_WORD) + group % PER_WORD
    return tl.load(numbers.to(tl.pointer_type(dtype), bitcast=True) + place)


@jit
def _halves_of(numbers, word, stride, dtype: tl.constexpr, GROUPS: tl.constexpr):
    """Scales or zeros of the two groups in a word: [V, 1] each."""
    both = tl.load(numbers + tl.minimum(word, (GROUPS - 1) // 2) * stride)
    one, two = (both & 0xFFFF).to(tl.int16), (both >> 16).to(tl.int16)
    return one.to(dtype, bitcast=True)[:, None], two.to(dtype, bitcast=True)[:, None]


@jit
def _of_groups(
    numbers,  # pointers [V] to the first groups' words
    tile,
    stride,  # from one word of a row to the next
    dtype: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
):
    """Scales or zeros of a tile's runs: [V, M], or [V, 1] where all share one."""
    GROUP: tl.constexpr = K if FORM[1] == 0 else FORM[1]
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    run = _run_of(M, FORM)
    if FORM[1] % 128 == 0:  # all runs of a tile; 0: of a row
        return _of_group(numbers, tile * 128 // GROUP, stride, dtype, GROUPS)[:, None]
    elif dtype != tl.float32 and 64 % GROUP == 0:
        # whole words, whose rows are those of the products: nothing moves between threads
        one, two = _halves_of(numbers, tile * (64 // GROUP), stride, dtype, GROUPS)
        if GROUP == 64:
            return tl.where((run < 2)[None, :], one, two)
        else:
            three, four = _halves_of(numbers, tile * 2 + 1, stride, dtype, GROUPS)
            one = tl.where((run == 0)[None, :], one, two)
            return tl.where((run < 2)[None, :], one, tl.where((run == 2)[None, :], three, four))
    else:
        group = ((tile * 4 + run) * 32 // GROUP)[None, :]
        return _of_group(numbers[:, None], group, stride, dtype, GROUPS)


@jit
def _column_tile(columns, first):
    """[128, M]: inputs of a tile, from pointers [M]."""
    return tl.load(columns[None, :] + first + tl.arange(0, 128)[:, None])


@jit
def _run_tiles(halves, block, M: tl.constexpr, FORM: tl.constexpr):
    """int8 [32, M] twice: runs of both tiles side by side, from pointers [M] to halves, whose words
    have both."""
    halves = halves.to(tl.pointer_type(tl.int16), bitcast=True) + block * 128
    words = tl.load((halves + _run_of(M, FORM) * 32)[None, :] + tl.arange(0, 32)[:, None])
    if FORM[6]:
        return tl.inline_asm_elementwise(
            BYTES, "=r,=r,r,r", [words], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        return words.to(tl.int8), (words >> 8).to(tl.int8)


@jit
def _signed_bytes(words, ASM: tl.constexpr):
    """Codes of 8 bits minus 128."""
    if ASM:
        return tl.inline_asm_elementwise(
            EIGHTS, "=r,r", [words], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (words.to(tl.int32) ^ -128).to(tl.int8)


@jit
def _upper_fours(words, ASM: tl.constexpr):
    """Two codes of 4 bits in each byte, 16 times what they mean: those of the first four runs, and
    of the others."""
    if ASM:
        return tl.inline_asm_elementwise(
            FOURS, "=r,=r,r", [words], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        wide = words.to(tl.int32)
        return ((wide << 4) ^ 128).to(tl.int8), ((wide & 0xF0) ^ 128).to(tl.int8)


@jit
def _upper_threes(words, high, ASM: tl.constexpr):
    """A tuple of tiles [V, 32], one by slot: codes of 3 bits, 32 times what they mean."""
    if ASM:
        return tl.inline_asm_elementwise(
            THREES,
            THREES_OUT,
            [words, high],
            dtype=(
                tl.int8,
                tl.int8,
                tl.int8,
                tl.int8,
                tl.int8,
                tl.int8,
                tl.int8,
                tl.int8,
            ),
            is_pure=True,
            pack=4,
        )
    else:
        low, upper, found = words.to(tl.int32), high.to(tl.int32), ()
        for slot in tl.static_range(8):
            code = ((low >> (2 * slot)) & 3) | ((upper >> slot) & 1) << 2
            found = found + (((code << 5) ^ 128).to(tl.int8),)
        return found


@jit
def _sums(codes, x, HAS_ZERO: tl.constexpr):
    """A pair int32 [V, M]: values by a tile of x, and the sums of x for their zeros."""
    by_value = tl.dot(codes, x, out_dtype=tl.int32)
    return by_value, _sums_of(codes, x, by_value, HAS_ZERO)


@jit
def _sums_of(codes, x, like, HAS_ZERO: tl.constexpr):
    if HAS_ZERO:
        return tl.dot(tl.full(codes.shape, 1, tl.int8), x, out_dtype=tl.int32)
    else:
        return like


@jit
def _sums_by_run(codes, x, HAS_ZERO: tl.constexpr, M: tl.constexpr, FORM: tl.constexpr):
    """As `_sums`, of four tiles [V, 32], each by its own columns of x [32, M]."""
    by_value = tl.dot(codes[0], x, out_dtype=tl.int32)
    for run in tl.static_range(1, 4):
        own = (_run_of(M, FORM) == run)[None, :]
        by_value = tl.where(own, tl.dot(codes[run], x, out_dtype=tl.int32), by_value)
    return by_value, _sums_of(codes[0], x, by_value, HAS_ZERO)


@jit
def _less_zeros(sums, zeros, HAS_ZERO: tl.constexpr):
    """float32 [V, M]"""
    if HAS_ZERO:
        return sums[0].to(tl.float32) - sums[1].to(tl.float32) * zeros
    else:
        return sums[0].to(tl.float32)


@jit
def _block_codes(
    weights,  # as `fixed_product` takes them
    block,
    is_there,  # else nothing is read
    FORM: tl.constexpr,
):
    """What memory holds of a block: bytes [V, 128] of both tiles (4 bits: one that holds both), or
    words and high bits [V, 32]."""
    low, high = weights[0], weights[1]
    q = tl.arange(0, 32 if FORM[0] == 3 else 128)[None, :]
    if FORM[0] == 3:
        one = tl.load((low + block * 32)[:, None] + q, mask=is_there)
        two = tl.load((high + block * 32)[:, None] + q, mask=is_there)
    else:
        code: tl.constexpr = tl.float8e4nv if FORM[2] else tl.int8
        low = low.to(tl.pointer_type(code), bitcast=True)
        one = tl.load((low + block * (32 * FORM[0]))[:, None] + q, mask=is_there)
        two = one
        if FORM[0] == 8:
            two = tl.load((low + block * 256 + 128)[:, None] + q, mask=is_there)
    return one, two


@jit
def _block_inputs(columns, halves, block, M: tl.constexpr, FORM: tl.constexpr):
    """Columns of both tiles of a block: [128, M], or of 3 bits [32, M]."""
    if FORM[0] == 3:
        return _run_tiles(halves, block, M, FORM)
    else:
        return _column_tile(columns, block * 256), _column_tile(columns, block * 256 + 128)


@jit
def _block_sum(
    codes,  # of `_block_codes`
    inputs,  # of `_block_inputs`
    zeros,  # of `_zeros`
    factors,  # of `_factors`
    M: tl.constexpr,
    FORM: tl.constexpr,
):
    """float32 [V, M]: products of a block, by columns."""
    HAS_ZERO: tl.constexpr = FORM[3]
    if FORM[0] == 3:
        found = _upper_threes(codes[0], codes[1], FORM[6])
        one = _sums_by_run(found[:4], inputs[0], HAS_ZERO, M, FORM)
        two = _sums_by_run(found[4:], inputs[1], HAS_ZERO, M, FORM)
    elif FORM[2]:
        one = tl.dot(codes[0].to(tl.float16), inputs[0])
        two = tl.dot(codes[1].to(tl.float16), inputs[1])
        one, two = (one, one), (two, two)
    else:
        if FORM[0] == 4:
            a, b = _upper_fours(codes[0], FORM[6])
        else:
            a, b = _signed_bytes(codes[0], FORM[6]), _signed_bytes(codes[1], FORM[6])
        one, two = _sums(a, inputs[0], HAS_ZERO), _sums(b, inputs[1], HAS_ZERO)
    one = _less_zeros(one, zeros[0], HAS_ZERO) * factors[0]
    return one + _less_zeros(two, zeros[1], HAS_ZERO) * factors[1]


@jit
def _zeros(
    zero,  # pointers [V] to the first groups' words of zeros
    block,
    stride,
    M: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
):
    """Zeros of both tiles of a block, in units of values: float32 [V, M] or [V, 1]; without zeros
    nothing."""
    if FORM[3]:
        found = ()
        for i in tl.static_range(2):
            each = _of_groups(zero, block * 2 + i, stride, tl.int16, M, K, FORM).to(tl.float32)
            found = found + ((each - (1 << (FORM[0] - 1))) * _unit_of(FORM[0]),)
        return found
    else:
        return 0.0, 0.0


@constexpr_function
def _unit_of(bits):
    """What a value of 1 is written as."""
    return 1 << (8 - bits)


@jit
def early_codes(
    weights,  # as `fixed_product` takes them
    first,  # block, and
    stop,  # the one behind the last
    is_there,  # else nothing is read
    EARLY: tl.constexpr,  # blocks
    FORM: tl.constexpr,
):
    """A tuple of what memory holds of the first blocks: read before the inputs are there, while
    other kernels leave the memory alone."""
    found = ()
    for i in tl.static_range(EARLY):
        found = found + (_block_codes(weights, tl.minimum(first + i, stop - 1), is_there, FORM),)
    return found


@jit
def fixed_product(
    weights,  # pointers [V] to rows' first words, high bits (of 3 bits), words of scales and of
    # zeros, and the stride from one word of scales to the next
    early,  # of `early_codes`
    x,  # int8 [B, 8, P], float16 [B, 4, P], int8 [B, 2, P] and float32 [B, R]
    token,  # the first of the tile
    num_tokens,  # B
    first,  # block, and
    stop,  # the one behind the last
    V: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    EARLY: tl.constexpr,  # blocks that are there
):
    """float32 [V, T]: rows by tokens."""
    scale, zero, stride = weights[2], weights[3], weights[4]
    M: tl.constexpr = _columns_of(T, FORM[2])
    EACH: tl.constexpr = 4 if FORM[2] else 8
    BLOCKS: tl.constexpr = (K + 255) // 256
    c = tl.arange(0, M)
    which = tl.minimum(token + tl.minimum(c // EACH, T - 1), num_tokens - 1).to(tl.int64)
    columns = x[0]  # of 3 bits, nothing reads them
    halves = x[2]
    if FORM[0] == 3:
        halves += (which * 2 + c % 2) * (BLOCKS * 256)
    else:
        columns = (x[1] if FORM[2] else x[0]) + (which * EACH + c % EACH) * (BLOCKS * 256)
    unit = x[3] + which * (BLOCKS * 8)
    total = tl.zeros([V, M], tl.float32)
    inputs = ()
    for i in tl.static_range(EARLY):
        block = tl.minimum(first + i, BLOCKS - 1)
        own = _block_inputs(columns, halves, block, M, FORM)
        zeros = _zeros(zero, block, stride, M, K, FORM)
        inputs = inputs + ((own, zeros, _factors(scale, unit, block, stride, M, K, FORM)),)
    # a block ahead: what is no operand of a product is not loaded ahead by the compiler
    block = tl.minimum(first + EARLY, BLOCKS - 1)
    factors = _factors(scale, unit, block, stride, M, K, FORM)
    for block in range(first + EARLY, stop):
        zeros = _zeros(zero, block, stride, M, K, FORM)
        own = _block_inputs(columns, halves, block, M, FORM)
        codes = _block_codes(weights, block, True, FORM)
        total += _block_sum(codes, own, zeros, factors, M, FORM)
        later = tl.minimum(block + 1, BLOCKS - 1)
        factors = _factors(scale, unit, later, stride, M, K, FORM)
    for i in tl.static_range(EARLY):
        own = inputs[i]
        part = _block_sum(early[i], own[0], own[1], own[2], M, FORM)
        total += tl.where(first + i < stop, part, 0.0)
    if FORM[2]:
        total = tl.where((c < 4 * T)[None, :], total, 0.0)
    else:
        of_low: tl.constexpr = 1.0 / _unit_of(FORM[0])
        total *= tl.where(c % 2 == 0, 256.0 * of_low, of_low)[None, :]
    return tl.sum(tl.reshape(total, [V, T, M // T]), axis=2)


@jit
def fixed_project_kernel(
    x,  # [B, K], rows of x_stride, for plain weights
    columns,  # int8 [B, 8, P] and
    wide_columns,  # float16 [B, 4, P] and
    halves,  # int8 [B, 2, P] and
    unit,  # float32 [B, R]: x in fixed point
    tiles,  # int64 [tiles, 8], and
    ups,  # with IS_GATED, alike: see `packed_project_kernel`
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
    T: tl.constexpr,  # B, or more, a power of two up to 4
    IS_GATED: tl.constexpr,
    HAS_PLAIN: tl.constexpr,
    EARLY: tl.constexpr,  # blocks of codes that are read before the inputs are there
    FORM: tl.constexpr,
    IS_LINKED: tl.constexpr,
):
    """out = x @ weights^T, or silu(x @ weights^T) * (x @ ups^T); splits of a sum side by side."""
    BLOCKS: tl.constexpr = (K + 255) // 256
    WORDS: tl.constexpr = BLOCKS * (64 if FORM[0] == 8 else 32)
    SHARE: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    first = tl.program_id(1) * SHARE
    stop = tl.minimum(first + SHARE, BLOCKS)
    tile = tiles + tl.program_id(0) * 8
    size = tl.load(tile + 6)
    row = tl.load(tile + 5) + tl.minimum(tl.arange(0, V), size - 1)
    is_plain = tl.load(tile + 2) == 0
    total = tl.zeros([V, T], tl.float32)
    for i in tl.static_range(2 if IS_GATED else 1):
        source = tile if i == 0 else ups + tl.program_id(0) * 8
        weights = (
            pointer_to(tl.load(source), words) + row * WORDS,
            pointer_to(tl.load(source + 1), uppers) + row * WORDS,
            tl.load(source + 2).to(scales.dtype) + row // FORM[5],
            tl.load(source + 3).to(zeros.dtype) + row // FORM[5],
            tl.load(source + 4),
        )
        is_packed = not is_plain if HAS_PLAIN else True
        early = early_codes(weights, first, stop, is_packed, EARLY, FORM)
        if i == 0:
            wait(IS_LINKED)
        y = tl.zeros([V, T], tl.float32)
        if HAS_PLAIN:
            if is_plain:
                weight = pointer_to(tl.load(source), x) + row * K
                token = tl.minimum(tl.arange(0, 8) // (8 // T), num_rows - 1)
                address, last = x + token * x_stride, tl.minimum(stop * 256, K)
                wide = plain_product(weight, address, first * 256, last, V, 8, K, 128)
                one = (tl.arange(0, 8) % (8 // T) == 0)[None, :]
                y = tl.sum(tl.reshape(tl.where(one, wide, 0.0), [V, T, 8 // T]), axis=2)
        if not is_plain:
            inputs = (columns, wide_columns, halves, unit)
            y = fixed_product(
                weights, early, inputs, 0, num_rows, first, stop, V, T, K, FORM, EARLY
            )
        total = y if i == 0 else gated(total, y)
    n, t = tl.arange(0, V)[:, None], tl.arange(0, T)[None, :]
    target = out + t.to(tl.int64) * out_stride + tl.program_id(1) * split_stride
    target += tl.load(tile + 7) + n
    tl.store(target, total, mask=(t < num_rows) & (n < size))
