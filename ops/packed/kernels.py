"""What Triton kernels do with packed weights: take words apart, and multiply by them.

`block_values` gives a block of 8 tiles [N, 32] of weights in the inputs' dtype, scaled, each
in the layout of the words that were loaded: the tensor cores' operand, where it is used as one. Of
two words each, halves of registers are filled by masks and a shift: an integer that stands in the
mantissa of 128 (bfloat16) or 1,024 (float16) is that number plus the integer. Without inline
assembly (the interpreter, other devices than CUDA's) the same is done by plain arithmetic.

Values equal those of `PackedWeights.dequantized`, bit by bit, where a code minus its zero has at
most 8 bits.

FORM is a tuple of what a kernel is compiled for, `unpacking.form` makes it: bits, group (0: a row),
whether codes are float8 numbers, whether groups have zeros, the scales' dtype, rows that share a
scale, whether inline assembly is possible.

Shapes: N outputs of a tile, K inputs, M columns (tokens) of a tile.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from kimi_linear.ops.runtime import constexpr_function, jit, tl
from kimi_linear.schemes import RUN as RUN_

RUN = RUN_ if tl is None else tl.constexpr(RUN_)

# By dtype: type of PTX' operations, a number whose last mantissa bit is 1, 1, -1, the factor of
# float8 numbers whose bits were put into the dtype's, and the shift that puts them there.
_BFLOAT16 = ("bf16x2", 0x4300, 0x3F80, 0xBF80, 0x7B80, 4)
_FLOAT16 = ("f16x2", 0x6400, 0x3C00, 0xBC00, 0x5C00, 7)
# Numbers of `offset + middle` with a minus, by bits and dtype.
_MINUS = {
    (3, "bf16x2"): 0xC304,
    (4, "bf16x2"): 0xC308,
    (3, "f16x2"): 0xE404,
    (4, "f16x2"): 0xE408,
    (8, "f16x2"): 0xE480,
}
AND_OR, AND_XOR, NOT_AND_OR = 0xEA, 0x6A, 0xAE  # of lop3: (a & b) | c and so on


def _twice(half: int) -> str:
    return f"0x{half << 16 | half:08X}"


def _pair(bits: int, slot: int, offset: int) -> str:
    """PTX: `t` = offset + code of a slot, of the first word in the lower half and of the second in
    the upper one; `a` has such halves of words."""
    half, place = (slot % 4 // 2, slot % 2 * 8 + slot // 4 * 4) if bits == 4 else (0, 2 * slot)
    lines = [f"shr.b32 t, a{half}, {place};"]
    mask = _twice(15 if bits == 4 else 3)
    lines.append(f"lop3.b32 t, t, {mask}, {_twice(offset)}, {AND_OR};")
    if bits == 3:
        lines.append(f"shl.b32 u, h, {2 - slot};" if slot < 2 else f"shr.b32 u, h, {slot - 2};")
        lines.append(f"lop3.b32 t, u, {_twice(4)}, t, {AND_OR};")
    return " ".join(lines)


def _slots_asm(bits: int, is_float: bool, kind: tuple[str, int, int, int, int, int]) -> str:
    """PTX that takes two words (of 3 bits, four) apart into pairs of values, one for each slot."""
    ptx, offset, one, minus_one, factor, shift = kind
    num_slots = 4 if bits == 8 else 8
    first, second = f"${num_slots}", f"${num_slots + 1}"
    lines = ["{ .reg .b32 t, u, a0, a1, h, factor, minus;"]
    if bits < 8:
        lines += [f"prmt.b32 a0, {first}, {second}, 0x5410;"]
        if bits == 4:
            lines += [f"prmt.b32 a1, {first}, {second}, 0x7632;"]
        else:
            lines += [f"prmt.b32 h, ${num_slots + 2}, ${num_slots + 3}, 0x5410;"]
        lines += [f"mov.b32 factor, {_twice(one)}; mov.b32 minus, {_twice(_MINUS[bits, ptx])};"]
        for slot in range(8):
            lines.append(_pair(bits, slot, offset))
            lines.append(f"fma.rn.{ptx} ${slot}, t, factor, minus;")
        return " ".join([*lines, "}"])
    if is_float:
        lines += [f"mov.b32 factor, {_twice(factor)}; mov.b32 minus, 0x80008000;"]
    elif ptx == "f16x2":
        lines += [f"mov.b32 factor, {_twice(one)}; mov.b32 minus, {_twice(_MINUS[8, ptx])};"]
    else:
        lines += [f"mov.b32 factor, {_twice(minus_one)};"]
    for slot in range(4):
        picked = (4 + slot) * 0x11 << 8 | slot * 0x11
        lines.append(f"prmt.b32 t, {first}, {second}, 0x{picked:04X};")
        if is_float:
            lines.append(f"shl.b32 u, t, {shift};")
            lines.append(f"and.b32 u, u, {_twice(0x7F << shift)};")
            lines.append(f"lop3.b32 u, t, 0x80008000, u, {AND_OR};")
            lines.append(f"fma.rn.{ptx} ${slot}, u, factor, minus;")
        elif ptx == "f16x2":
            mask, middle = _twice(0xFF), _twice(offset)
            lines.append(f"lop3.b32 u, t, {mask}, {middle}, {AND_OR};")
            lines.append(f"fma.rn.{ptx} ${slot}, u, factor, minus;")
        else:  # 128 has room for 7 bits; without the eighth, what is subtracted is 128 more
            lines.append(f"lop3.b32 u, t, {_twice(0x7F)}, {_twice(offset)}, {AND_OR};")
            lines.append(f"lop3.b32 t, t, {_twice(0x80)}, {_twice(offset)}, {NOT_AND_OR};")
            lines.append(f"fma.rn.{ptx} ${slot}, t, factor, u;")
    return " ".join([*lines, "}"])


def constant(value: str) -> object:
    return value if tl is None else tl.constexpr(value)


ASM_3, ASM_4 = (constant(_slots_asm(bits, False, _BFLOAT16)) for bits in (3, 4))
ASM_8, ASM_FLOAT8 = (constant(_slots_asm(8, is_float, _BFLOAT16)) for is_float in (False, True))
ASM_3_HALF, ASM_4_HALF = (constant(_slots_asm(bits, False, _FLOAT16)) for bits in (3, 4))
ASM_8_HALF, ASM_FLOAT8_HALF = (
    constant(_slots_asm(8, is_float, _FLOAT16)) for is_float in (False, True)
)
_TIMES = "{{ .reg .b32 c; mov.b32 c, 0x80008000; fma.rn.{} $0, $1, $2, c; }}"
_LESS = "{{ .reg .b32 c; mov.b32 c, {}; fma.rn.{} $0, $2, c, $1; }}"
SCALE, SCALE_HALF = (constant(_TIMES.format(kind[0])) for kind in (_BFLOAT16, _FLOAT16))
MINUS, MINUS_HALF = (
    constant(_LESS.format(_twice(kind[3]), kind[0])) for kind in (_BFLOAT16, _FLOAT16)
)
OUT_4 = constant("=r,=r,=r,=r,r,r")
OUT_8 = constant("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r")  # 4 bits leave the last two alone


@jit
def _eight(asm: tl.constexpr, words, high):
    """Values as int16 of their bits, so that one list of types serves both dtypes."""
    return tl.inline_asm_elementwise(
        asm,
        OUT_8,
        [words, high],
        dtype=(
            tl.int16,
            tl.int16,
            tl.int16,
            tl.int16,
            tl.int16,
            tl.int16,
            tl.int16,
            tl.int16,
        ),
        is_pure=True,
        pack=2,
    )


@jit
def _four(asm: tl.constexpr, words):
    return tl.inline_asm_elementwise(
        asm,
        OUT_4,
        [words],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
        is_pure=True,
        pack=2,
    )


@jit
def slot_values(words, high, FORM: tl.constexpr, dtype: tl.constexpr):
    """A tuple of tiles, one by slot: code minus middle, or the float8 number."""
    BITS: tl.constexpr = FORM[0]
    IS_FLOAT: tl.constexpr = FORM[2]
    ASM: tl.constexpr = FORM[6]
    low = words.to(tl.int32)
    upper = high.to(tl.int32)
    if BITS == 3:
        low &= 0xFFFF
    found = ()
    if ASM:
        is_bf16: tl.constexpr = dtype == tl.bfloat16
        if BITS == 3:
            bits = _eight(ASM_3 if is_bf16 else ASM_3_HALF, low, upper)
        elif BITS == 4:
            bits = _eight(ASM_4 if is_bf16 else ASM_4_HALF, low, upper)
        elif IS_FLOAT:
            bits = _four(ASM_FLOAT8 if is_bf16 else ASM_FLOAT8_HALF, low)
            bits = bits + _four(ASM_FLOAT8 if is_bf16 else ASM_FLOAT8_HALF, upper)
        else:
            bits = _four(ASM_8 if is_bf16 else ASM_8_HALF, low)
            bits = bits + _four(ASM_8 if is_bf16 else ASM_8_HALF, upper)
        for slot in tl.static_range(8):
            found = found + (bits[slot].to(dtype, bitcast=True),)
        return found
    else:
        for slot in tl.static_range(8):
            if BITS == 3:
                code = ((low >> (2 * slot)) & 3) | (((upper >> slot) & 1) << 2)
            elif BITS == 4:
                code = (low >> (slot % 4 * 8 + slot // 4 * 4)) & 15
            elif slot < 4:
                code = (low >> (8 * slot)) & 255
            else:
                code = (upper >> (8 * slot - 32)) & 255
            if IS_FLOAT:
                exponent, mantissa = (code >> 3) & 15, (code & 7).to(tl.float32)
                size = tl.where(
                    exponent > 0,
                    (8.0 + mantissa) * tl.exp2(exponent.to(tl.float32) - 10.0),
                    mantissa * 0.001953125,
                )
                value = tl.where(code > 127, -size, size)
            else:
                value = (code - (1 << (BITS - 1))).to(tl.float32)
            found = found + (value.to(dtype),)
        return found


@jit
def _scaled(value, scale, zero, HAS_ZERO: tl.constexpr, ASM: tl.constexpr):
    """(value - zero) * scale, rounded to the values' dtype once."""
    is_bf16: tl.constexpr = value.dtype == tl.bfloat16
    if ASM and scale.dtype == value.dtype:
        if HAS_ZERO:
            value = tl.inline_asm_elementwise(
                MINUS if is_bf16 else MINUS_HALF,
                "=r,r,r",
                [value, zero],
                dtype=value.dtype,
                is_pure=True,
                pack=2,
            )
        return tl.inline_asm_elementwise(
            SCALE if is_bf16 else SCALE_HALF,
            "=r,r,r",
            [value, scale],
            dtype=value.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        wide = value.to(tl.float32)
        if HAS_ZERO:
            wide -= zero.to(tl.float32)
        return (wide * scale.to(tl.float32)).to(value.dtype)


@jit
def load_words(low, high, block, FORM: tl.constexpr):
    """Words [N, 32] of each row's block, and the plane of high bits (3 bits) or the second half
    (8 bits), from pointers [N] to rows' first words."""
    j = tl.arange(0, RUN)[None, :]
    if FORM[0] == 8:
        first = (low + block * 64)[:, None] + j
        return tl.load(first), tl.load(first + 32)
    elif FORM[0] == 3:
        return tl.load((low + block * 32)[:, None] + j), tl.load((high + block * 32)[:, None] + j)
    else:
        words = tl.load((low + block * 32)[:, None] + j)
        return words, words


@constexpr_function
def _sharing(group):
    """How many slots of a block share a group, beginning at the first."""
    if group == 0 or group % 256 == 0:
        return 8
    return group // 32 if 256 % group == 0 else 1


@jit
def _word_of(pointer, group, stride, PER_WORD: tl.constexpr, GROUPS: tl.constexpr):
    """The 32 bits that hold a group's number."""
    return tl.load(pointer + tl.minimum(group, GROUPS - 1) // PER_WORD * stride)


@jit
def load_scales(
    scale,  # pointers [N] to words of scales of the first groups, and
    zero,  # of zeros, if there are any
    block,
    stride,  # from one word of a row to the next
    K: tl.constexpr,
    FORM: tl.constexpr,
):
    """A tuple of the words that hold scales and zeros of a block's slots."""
    GROUP: tl.constexpr = FORM[1]
    SIZE: tl.constexpr = K if GROUP == 0 else GROUP
    GROUPS: tl.constexpr = (K + SIZE - 1) // SIZE
    PER_WORD: tl.constexpr = 1 if tl.float32 == FORM[4] else 2
    SHARING: tl.constexpr = _sharing(GROUP)
    found = ()
    for slot in tl.static_range(8):
        if slot % SHARING == 0:
            group = (block * 8 + slot) * 32 // SIZE
            found = found + (_word_of(scale, group, stride, PER_WORD, GROUPS),)
            if FORM[3]:
                found = found + (_word_of(zero, group, stride, 2, GROUPS),)
    return found


@jit
def _half_of(word, block, slot: tl.constexpr, GROUP: tl.constexpr):
    """The bits of a slot's group in a word that holds two; by a constant shift where it can be: the
    layout of what depends on other numbers would not follow that of the words."""
    if GROUP == 0:
        return word & 0xFFFF
    elif 256 % (2 * GROUP) == 0:
        return (word >> (slot * 32 // GROUP % 2 * 16)) & 0xFFFF
    else:
        return (word >> ((block * 8 + slot) * 32 // GROUP % 2 * 16)) & 0xFFFF


@jit
def block_values(
    words,  # [N, 32] and
    high,  # [N, 32], see `load_words`
    scales,  # see `load_scales`
    block,
    FORM: tl.constexpr,
    dtype: tl.constexpr,
):
    """A tuple of weights [N, 32], one tile for each of the block's 8 slots."""
    BITS: tl.constexpr = FORM[0]
    GROUP: tl.constexpr = FORM[1]
    HAS_ZERO: tl.constexpr = FORM[3]
    SCALE: tl.constexpr = FORM[4]
    STEP: tl.constexpr = 2 if HAS_ZERO else 1
    SHARING: tl.constexpr = _sharing(GROUP)
    values = slot_values(words, high, FORM, dtype)
    found = ()
    for slot in tl.static_range(8):
        if slot % SHARING == 0:
            word = scales[slot // SHARING * STEP]
            if tl.float32 == SCALE:
                scale = word.to(tl.float32, bitcast=True)
            else:
                scale = _half_of(word, block, slot, GROUP).to(tl.int16).to(SCALE, bitcast=True)
            spread = tl.broadcast_to(scale[:, None], words.shape)
            zeros = spread
            if HAS_ZERO:
                zero = _half_of(scales[slot // SHARING * STEP + 1], block, slot, GROUP)
                zero = (zero - (1 << (BITS - 1))).to(tl.float32).to(dtype)
                zeros = tl.broadcast_to(zero[:, None], words.shape)
        found = found + (_scaled(values[slot], spread, zeros, HAS_ZERO, FORM[6]),)
    return found


@jit
def add_products(
    total,  # float32 [N, M], added to
    values,  # see `block_values`
    x,  # pointers [M] to columns' first inputs, of the weights' dtype
    block,
    K: tl.constexpr,
    IS_WHOLE: tl.constexpr,  # no block reaches beyond K
):
    """total + weights of a block by their inputs."""
    for slot in tl.static_range(8):
        first = block * 256 + slot * 32
        k = tl.arange(0, RUN)[:, None]
        if IS_WHOLE:
            a = tl.load((x + first)[None, :] + k)
        else:
            a = tl.load((x + first)[None, :] + k, mask=k < K - first, other=0.0)
        total = tl.dot(values[slot], a, total)
    return total
