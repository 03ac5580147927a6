"""Products of float8 rows and float8 weights, for many rows.

DeepSeek-V3's scheme (arXiv 2412.19437, section 3.3): a row's inputs are quantised in blocks of 128,
each with a float32 scale of its own, max |x| / 448; weights are as they are held. The tensor cores
add up the products of a block, and scales are applied to each block's sum in float32. Nothing is
unpacked: of a block of 128 inputs, the bytes of words stand in the order of `codes.py`, and rows
are quantised into the same order.

A GPU has these products from compute capability 8.9 on, at twice the speed of 16-bit ones.

Shapes: T rows, N outputs, K inputs, B = ceil(K / 128) blocks of a row.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kimi_linear.ops.chip import INTERPRETED, architecture, has_large_memory
from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.packed.library import block_product, fits, has_block_products
from kimi_linear.ops.packed.unpacking import DEVICES, HAS_KERNELS
from kimi_linear.ops.runtime import ceil_div, is_traced, jit, tl
from kimi_linear.schemes import FLOAT8_BLOCK, RUN

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no triton, or an old one
    TensorDescriptor = None

DTYPES = (torch.bfloat16, torch.float16)
FIRST_ARCHITECTURE = 89  # with products of float8 numbers
BLOCK, RUN_, LARGEST = FLOAT8_BLOCK, RUN, 448.0
if tl is not None:
    BLOCK, RUN_, LARGEST = tl.constexpr(FLOAT8_BLOCK), tl.constexpr(RUN), tl.constexpr(448.0)
# Whether hardware copies tiles where it can. Without, a linear layer takes half as long again.
USES_DESCRIPTORS = True
# Whether linear layers are multiplied by cuBLAS where it can.
USES_LIBRARY = True
QUANTIZED_ROWS = 16  # of a program that quantises
# Rows, columns, halves (a program has as many tiles side by side), warps and stages of a tile: with
# the shared memory of Hopper and data-centre Blackwell, and with that of others. Where rows of
# weights have scales of their own, sums of 256 columns leave no registers for them.
LARGE_TILE = (128, 128, 2, 8, 4)
ROW_SCALES_TILE = (64, 128, 1, 4, 3)
SMALL_TILE = (64, 128, 1, 8, 2)


class Float8Rows(NamedTuple):
    """Rows in blocks of float8 numbers.

    Attributes:
        codes: float8_e4m3fn [T, 128 B], each block in the order of the weights' bytes.
        scale: float32 [B, T].
    """

    codes: Tensor
    scale: Tensor


def takes_float8(weights: Any) -> bool:
    """Whether a packed tensor's scheme allows products by quantised rows, and this GPU has them."""
    device = weights.device
    return (
        weights.scheme.has_float8_products
        and HAS_KERNELS
        and weights.dtype in DTYPES
        and device.type in DEVICES
        and not is_traced()
        and torch.version.hip is None
        and (architecture(device) >= FIRST_ARCHITECTURE or architecture(device) == INTERPRETED)
    )


def takes_library(num_rows: int, weights: Any, dtype: torch.dtype) -> bool:
    """Whether cuBLAS multiplies rows by weights of which `takes_float8`; dtype: the result's."""
    is_there = USES_LIBRARY and has_block_products(architecture(weights.device))
    return is_there and fits(num_rows, weights, dtype)


def quantize_rows(x: Tensor, places: Tensor | None = None) -> Float8Rows:
    """Quantise rows [T, K]; with places int64 [T, k], a row is written to each of its: [T k, K]."""
    (T, K), x = x.shape, x.contiguous()
    blocks, copies = ceil_div(K, FLOAT8_BLOCK), 1 if places is None else places.shape[1]
    size = (T * copies, blocks * FLOAT8_BLOCK)
    codes = torch.empty(size, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(blocks, size[0], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _quantize_rows[(ceil_div(T, QUANTIZED_ROWS), blocks)](
            x,
            places,
            codes,
            scale,
            T,
            K=K,
            WIDTH=size[1],
            COPIES=copies,
            HAS_PLACES=places is not None,
            ROWS=QUANTIZED_ROWS,
            num_warps=4,
        )
    return Float8Rows(codes, scale)


def float8_linear(rows: Float8Rows, weights: Any, dtype: torch.dtype) -> Tensor:
    """[T, N]: the product of quantised rows and packed weights [N, K].

    Args:
        rows: [T, K].
        weights: Packed, of which `takes_float8`.
        dtype: Of the result.
    """
    T, (N, K) = rows.codes.shape[0], weights.shape
    if takes_library(T, weights, dtype):
        return block_product(*rows, weight_bytes(weights), weights)
    out = torch.empty(T, N, dtype=dtype, device=rows.codes.device)
    tile_rows, columns, halves, num_warps, num_stages = _tile(weights, out.device)
    with torch.cuda.device_of(out):
        _float8_linear[(ceil_div(T, tile_rows) * ceil_div(N, halves * columns),)](
            tiles_of_bytes(rows.codes, tile_rows),
            rows.scale,
            tiles_of_bytes(weight_bytes(weights), columns),
            weights.scale,
            out,
            T,
            N=N,
            K=K,
            SCALES=scales_form(weights, columns),
            HAS_DESCRIPTORS=has_descriptors(out.device),
            ROWS=tile_rows,
            COLUMNS=columns,
            HALVES=halves,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out


def _tile(weights: Any, device: torch.device) -> tuple[int, int, int, int, int]:
    if not has_large_memory(device):
        return SMALL_TILE
    return ROW_SCALES_TILE if weights.scheme.rows % FLOAT8_BLOCK else LARGE_TILE


def weight_bytes(weights: Any) -> Tensor:
    """Codes as float8 numbers in the order of memory: [M N, bytes of a row]."""
    words = weights.planes[0]
    return words.view(torch.float8_e4m3fn).view(-1, words.shape[-1] * 4)


def scales_form(weights: Any, columns: int) -> tuple[int, int, int, int, int, bool]:
    """SCALES, by which kernels find the weights' scales: inputs that share one, groups of a row,
    groups side by side, rows that share one, scales of a matrix's column of groups, and whether a
    tile of `columns` rows has one scale only."""
    scheme, (num_rows, num_inputs) = weights.scheme, weights.shape[-2:]
    return (
        scheme.group or num_inputs,
        scheme.num_groups(num_inputs),
        weights.scale.shape[-1],
        scheme.rows,
        ceil_div(num_rows, scheme.rows),
        scheme.rows % columns == 0,
    )


def tiles_of_bytes(rows: Tensor, tile_rows: int) -> Any:
    """What a kernel reads tiles of rows and blocks from; hardware copies them from Hopper on."""
    if not has_descriptors(rows.device):
        return rows
    return TensorDescriptor.from_tensor(rows, [tile_rows, FLOAT8_BLOCK])


def has_descriptors(device: torch.device) -> bool:
    """Whether `tiles_of_bytes` gives descriptors."""
    if not USES_DESCRIPTORS or TensorDescriptor is None:
        return False
    return architecture(device) >= 90 or architecture(device) == INTERPRETED


# --------------------------------------------------------------------------------------- kernels
@jit
def to_float8(value, ROWS: tl.constexpr):
    """Float8 numbers of a block float32 [ROWS, 128], in the order of weights, and scales [ROWS]."""
    scale = tl.maximum(tl.max(tl.abs(value), axis=1), 1e-12) / LARGEST
    number = (value / scale[:, None]).to(tl.float8e4nv)
    number = tl.permute(tl.reshape(number, (ROWS, BLOCK // RUN_, RUN_)), (0, 2, 1))
    return tl.reshape(number, (ROWS, BLOCK)), scale


@jit
def load_bytes(source, first, rows, block, STRIDE: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr):
    """A tile of float8 numbers: a block of the rows from `first` on, or of rows by number."""
    if HAS_DESCRIPTORS:
        return source.load([first, block * BLOCK])
    else:
        k = tl.arange(0, BLOCK)
        return tl.load(source + rows.to(tl.int64)[:, None] * STRIDE + block * BLOCK + k[None, :])


@jit
def load_weight_scale(scale, first, rows, block, SCALES: tl.constexpr):
    """Scales of a block of weights' rows: one number, or [1, rows]."""
    group = tl.minimum(block * BLOCK // SCALES[0], SCALES[1] - 1)
    place = group // SCALES[2] * SCALES[4] * SCALES[2] + group % SCALES[2]
    if SCALES[5]:
        return tl.load(scale + place + first // SCALES[3] * SCALES[2]).to(tl.float32)
    else:
        found = tl.load(scale + place + rows // SCALES[3] * SCALES[2])
        return found.to(tl.float32)[None, :]


@jit
def add_blocks(
    rows,  # float8, pointers to their scales, scales of a block, the first row, each row
    matrix,  # float8, its scales, its first row, first columns of the tile and of the other
    N: tl.constexpr,
    K: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Products float32 [ROWS, COLUMNS] of rows and the matrix's outputs from a column on, and with
    two halves from another column on."""
    BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    BYTES: tl.constexpr = (K + 255) // 256 * 256
    x, x_scale, num_scales, first, own_row = rows
    weights, w_scale, start, column, other_column = matrix
    n = tl.minimum(column + tl.arange(0, COLUMNS), N - 1)
    other_n = tl.minimum(other_column + tl.arange(0, COLUMNS), N - 1)
    one = tl.zeros((ROWS, COLUMNS), tl.float32)
    other = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(BLOCKS):
        scale = tl.load(x_scale + block * num_scales)[:, None]
        value = load_bytes(x, first, own_row, block, BLOCKS * BLOCK, HAS_DESCRIPTORS)
        own = scale * load_weight_scale(w_scale, column, n, block, SCALES)
        weight = load_bytes(weights, start + column, start + n, block, BYTES, HAS_DESCRIPTORS)
        one += tl.dot(value, weight.T) * own
        if HALVES == 2:
            own = scale * load_weight_scale(w_scale, other_column, other_n, block, SCALES)
            weight = load_bytes(
                weights, start + other_column, start + other_n, block, BYTES, HAS_DESCRIPTORS
            )
            other += tl.dot(value, weight.T) * own
    return one, other


@jit
def next_column(column, N: tl.constexpr, COLUMNS: tl.constexpr):
    """The first column of the tile behind one, which is multiplied behind the last column too: by
    the last outputs there are."""
    return tl.minimum(column + COLUMNS, (N - 1) // COLUMNS * COLUMNS)


@jit
def store_columns(target, total, is_row, column, N: tl.constexpr):
    """Write a tile behind pointers to rows [ROWS, 1], from a column on."""
    n = column + tl.arange(0, total.shape[1])
    mask = is_row[:, None] & (n < N)[None, :]
    tl.store(target + n[None, :], total.to(target.dtype.element_ty), mask=mask)


@launch_directly
@jit(counts=("num_rows",))
def _quantize_rows(
    x,  # [T, K]
    places,  # [T, COPIES]
    codes,  # [T COPIES, WIDTH]
    scale,  # [B, T COPIES]
    num_rows,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    COPIES: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    ROWS: tl.constexpr,
):
    block = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None]
    value = tl.load(x + row[:, None] * K + column, mask=inside & (column < K), other=0.0)
    number, own = to_float8(value.to(tl.float32), ROWS)
    scale += block.to(tl.int64) * num_rows * COPIES
    for copy in tl.static_range(COPIES):
        place = row
        if HAS_PLACES:
            place = tl.load(places + row * COPIES + copy, mask=row < num_rows, other=0)
        tl.store(codes + place[:, None] * WIDTH + column, number, mask=inside)
        tl.store(scale + place, own, mask=row < num_rows)


@launch_directly
@jit(counts=("num_rows",))
def _float8_linear(
    x,  # float8 [T, 128 B]
    x_scale,  # [B, T]
    weights,  # float8 [N, bytes of a row]
    w_scale,
    out,  # [T, N]
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALVES: tl.constexpr,
):
    across: tl.constexpr = (N + HALVES * COLUMNS - 1) // (HALVES * COLUMNS)
    first = tl.program_id(0) // across * ROWS
    column = tl.program_id(0) % across * (HALVES * COLUMNS)
    row = first + tl.arange(0, ROWS)
    own_row = tl.minimum(row, num_rows - 1)
    one, other = add_blocks(
        (x, x_scale + own_row, num_rows, first, own_row),
        (weights, w_scale, 0, column, next_column(column, N, COLUMNS)),
        N,
        K,
        SCALES,
        HAS_DESCRIPTORS,
        ROWS,
        COLUMNS,
        HALVES,
    )
    target = out + row.to(tl.int64)[:, None] * N
    store_columns(target, one, row < num_rows, column, N)
    if HALVES == 2:
        store_columns(target, other, row < num_rows, column + COLUMNS, N)
