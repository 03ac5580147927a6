"""Triton kernels of float8 experts for many tokens: both products by quantised rows.

As those of `prefill_kernels.py`, by the products of `ops/packed/float8.py`. Tokens are quantised
once, and written where each of their experts reads them: hardware then copies whole tiles of rows,
and no registers hold where each row is. `gate_up` quantises what it gives, as each tile has whole
blocks of 128 inputs of `down`, so that no 16-bit rows are written between both.

Shapes: T tokens, D hidden size, I expert width, E experts, k experts of one token, P = T * k pairs
of a token and one of its experts, sorted by expert.
"""

# mypy: disable-error-code="no-untyped-def,union-attr,operator,assignment"

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.chip import has_large_memory
from kimi_linear.ops.experts.tiles import find_tile, tiles_of
from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.packed.float8 import (
    BLOCK,
    Float8Rows,
    add_blocks,
    has_descriptors,
    next_column,
    scales_form,
    store_columns,
    tiles_of_bytes,
    to_float8,
    weight_bytes,
)
from kimi_linear.ops.runtime import ceil_div, jit, power_of_two, tl
from kimi_linear.schemes import FLOAT8_BLOCK

# Of a tile of `gate_up`, which has a block of each half of the outputs: rows, warps and stages. Of
# one of `down`: rows, columns, halves, warps and stages. By average rows of an expert, first those
# from MANY_ROWS on, then from FEW_ROWS on, then below it; last, with less shared memory than
# Hopper's. (At 128 rows of an expert, a third of the tiles of 128 rows is padding. Where rows of
# weights have scales of their own, their sums leave no registers for them.)
GATE_UP_TILES = ((128, 8, 4), (64, 8, 3), (64, 8, 4), (64, 8, 2))
DOWN_TILES = ((64, 128, 1, 4, 3), (64, 128, 1, 4, 3), (64, 128, 2, 8, 4), (64, 128, 1, 8, 2))
MANY_ROWS, FEW_ROWS = 512, 64


def gate_up(rows: Float8Rows, ends: Tensor, weights: Any) -> Float8Rows:
    """[P, I], by expert, quantised: silu(gate) * up of rows [P, D] by expert, for packed weights
    [E, 2 I, D]. Rows with an out-of-range expert are left uninitialised."""
    P, (E, width, D) = rows.codes.shape[0], weights.shape
    I, device = width // 2, ends.device  # noqa: E741
    blocks = ceil_div(I, FLOAT8_BLOCK)
    codes = torch.empty(P, blocks * FLOAT8_BLOCK, dtype=torch.float8_e4m3fn, device=device)
    scale = torch.empty(blocks, P, dtype=torch.float32, device=device)
    tile_rows, num_warps, num_stages = _tile(GATE_UP_TILES, P, weights, device)
    *shared, is_single = scales_form(weights, FLOAT8_BLOCK)
    is_single = is_single and I % FLOAT8_BLOCK == 0  # the rows of `up` begin where a tile does
    with torch.cuda.device_of(ends):
        _float8_gate_up[(tiles_of(P, E, tile_rows) * blocks,)](
            tiles_of_bytes(rows.codes, tile_rows),
            rows.scale,
            ends,
            tiles_of_bytes(weight_bytes(weights), FLOAT8_BLOCK),
            weights.scale,
            codes,
            scale,
            P,
            D=D,
            I=I,
            **_sizes(weights, tile_rows),
            SCALES=(*shared, is_single),
            HAS_DESCRIPTORS=has_descriptors(device),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return Float8Rows(codes, scale)


def down(
    inner: Float8Rows, order: Tensor, ends: Tensor, weights: Any, dtype: torch.dtype
) -> Tensor:
    """[P, D], in the pairs' order, of a dtype, from inner [P, I] by expert and packed weights
    [E, D, I]. Rows with an out-of-range expert are left uninitialised."""
    P, (E, D, I) = order.numel(), weights.shape  # noqa: E741
    out = torch.empty(P, D, dtype=dtype, device=order.device)
    tile_rows, columns, halves, num_warps, num_stages = _tile(DOWN_TILES, P, weights, out.device)
    with torch.cuda.device_of(order):
        _float8_down[(tiles_of(P, E, tile_rows) * ceil_div(D, halves * columns),)](
            tiles_of_bytes(inner.codes, tile_rows),
            inner.scale,
            order,
            ends,
            tiles_of_bytes(weight_bytes(weights), columns),
            weights.scale,
            out,
            P,
            D=D,
            I=I,
            **_sizes(weights, tile_rows),
            COLUMNS=columns,
            HALVES=halves,
            SCALES=scales_form(weights, columns),
            HAS_DESCRIPTORS=has_descriptors(out.device),
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out


def _tile(tiles: Any, num_pairs: int, weights: Any, device: torch.device) -> Any:
    if not has_large_memory(device):
        return tiles[-1]
    average = num_pairs / weights.shape[0]
    has_block_scales = weights.scheme.rows % FLOAT8_BLOCK == 0
    if average >= MANY_ROWS and has_block_scales:
        return tiles[0]
    return tiles[1 if average >= FEW_ROWS else 2]


def _sizes(weights: Any, tile_rows: int) -> dict[str, int]:
    """What both kernels are compiled for."""
    E, words = weights.shape[0], weights.scale[0].numel()
    experts = max(16, power_of_two(E))
    return {"E": E, "EXPERTS": experts, "SCALES_EACH": words, "ROWS": tile_rows}


# --------------------------------------------------------------------------------------- kernels
@launch_directly
@jit(counts=("num_pairs",))
def _float8_gate_up(
    x,  # float8 [P, 128 blocks of D]
    x_scale,  # [blocks of D, P]
    ends,  # [E]
    weights,  # float8 [E * 2 * I, bytes of a row]
    w_scale,
    out,  # float8 [P, 128 blocks of I]
    out_scale,  # [blocks of I, P]
    num_pairs,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCALES_EACH: tl.constexpr,  # scales of an expert
    SCALES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
):
    across: tl.constexpr = (I + BLOCK - 1) // BLOCK
    expert, first, end = find_tile(ends, tl.program_id(0) // across, E, EXPERTS, ROWS)
    if expert >= E:
        return
    own_block = tl.program_id(0) % across
    column = own_block * BLOCK
    row = first + tl.arange(0, ROWS)
    own_row = tl.minimum(row, end - 1)
    gate, up = add_blocks(
        (x, x_scale + own_row, num_pairs, first, own_row),
        (weights, w_scale + expert.to(tl.int64) * SCALES_EACH, expert * 2 * I, column, column + I),
        2 * I,
        D,
        SCALES,
        HAS_DESCRIPTORS,
        ROWS,
        BLOCK,
        2,
    )
    inner = gate * tl.sigmoid(gate) * up
    n = (column + tl.arange(0, BLOCK))[None, :]
    if across * BLOCK != I:
        inner = tl.where(n < I, inner, 0.0)
    number, own = to_float8(inner, ROWS)
    place = row.to(tl.int64)
    target = out + place[:, None] * (across * BLOCK) + n
    tl.store(target, number, mask=(row < end)[:, None])
    tl.store(out_scale + own_block.to(tl.int64) * num_pairs + place, own, mask=row < end)


@launch_directly
@jit(counts=("num_pairs",))
def _float8_down(
    inner,  # float8 [P, 128 blocks of I]
    inner_scale,  # [blocks of I, P]
    order,  # [P]
    ends,  # [E]
    weights,  # float8 [E * D, bytes of a row]
    w_scale,
    out,  # [P, D]
    num_pairs,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCALES_EACH: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALVES: tl.constexpr,
):
    across: tl.constexpr = (D + HALVES * COLUMNS - 1) // (HALVES * COLUMNS)
    expert, first, end = find_tile(ends, tl.program_id(0) // across, E, EXPERTS, ROWS)
    if expert >= E:
        return
    column = tl.program_id(0) % across * (HALVES * COLUMNS)
    row = first + tl.arange(0, ROWS)
    own_row = tl.minimum(row, end - 1)
    one, other = add_blocks(
        (inner, inner_scale + own_row, num_pairs, first, own_row),
        (
            weights,
            w_scale + expert.to(tl.int64) * SCALES_EACH,
            expert * D,
            column,
            next_column(column, D, COLUMNS),
        ),
        D,
        I,
        SCALES,
        HAS_DESCRIPTORS,
        ROWS,
        COLUMNS,
        HALVES,
    )
    target = out + tl.load(order + row, mask=row < end, other=0)[:, None] * D
    store_columns(target, one, row < end, column, D)
    if HALVES == 2:
        store_columns(target, other, row < end, column + COLUMNS, D)
