"""Triton kernels of the routed experts, where no graph is recorded: two products in which every
expert's rows meet its own matrices, with what stands around them inside.

`gate_up` takes the tokens' rows by expert and ends with the gated SiLU; `down` puts its rows back
in the pairs' order. On an H200 both together, at 16 to 1,024 rows an expert, are faster than
`torch._grouped_mm` alone, and nothing is gathered, split or scattered through memory. Where half a
tile holds an expert's last rows, half a tile is multiplied: an eighth of the time less at 128 rows
an expert.

Shapes: T tokens, D hidden size, I expert width, E experts, k experts of one token, P = T * k pairs
of a token and one of its experts, sorted by expert.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

import torch
from torch import Tensor

from kimi_linear.ops.experts.tiles import find_tile, tiles_of
from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import ceil_div, jit, power_of_two, tl

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no triton, or an old one
    TensorDescriptor = None

# rows, columns and summands of a tile; columns count twice in `gate_up`
GATE_UP_TILE = (128, 128, 64)
DOWN_TILE = (128, 256, 64)
LAUNCH = {"num_warps": 8, "num_stages": 4}


def gate_up(
    x: Tensor,
    order: Tensor,
    ends: Tensor,
    weight: Tensor,
    k: int,
    first: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """[P, I], by expert: silu(gate) * up of the tokens' rows x [T, D], for weight [E, 2 I, D].
    Rows with an out-of-range expert are left uninitialised. With `out`, only the rows of E experts
    from the one numbered `first` on are written, to it."""
    P, (E, width, D) = order.numel(), weight.shape
    rows, columns, summands = GATE_UP_TILE
    if out is None:
        out = x.new_empty(P, width // 2)
    matrices = TensorDescriptor.from_tensor(weight.view(E * width, D), [columns, summands])
    grid = (tiles_of(P, E, rows) * ceil_div(width // 2, columns),)
    with torch.cuda.device_of(x):
        _gate_up[grid](
            x,
            order,
            matrices,
            out,
            ends[first : first + E],
            ends[max(first - 1, 0)],
            K=k,
            D=D,
            I=width // 2,
            E=E,
            HAS_BEFORE=first > 0,
            **_tile(E, GATE_UP_TILE),
        )
    return out


def down(
    inner: Tensor,
    order: Tensor,
    ends: Tensor,
    weight: Tensor,
    first: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """[P, D], in the pairs' order, from inner [P, I] by expert and weight [E, D, I].
    Rows with an out-of-range expert are left uninitialised. `first` and `out` as in `gate_up`."""
    P, (E, D, width) = order.numel(), weight.shape
    rows, columns, summands = DOWN_TILE
    if out is None:
        out = inner.new_empty(P, D)
    matrices = TensorDescriptor.from_tensor(weight.view(E * D, width), [columns, summands])
    grid = (tiles_of(P, E, rows) * ceil_div(D, columns),)
    with torch.cuda.device_of(inner):
        _down[grid](
            inner,
            order,
            matrices,
            out,
            ends[first : first + E],
            ends[max(first - 1, 0)],
            D=D,
            I=width,
            E=E,
            HAS_BEFORE=first > 0,
            **_tile(E, DOWN_TILE),
        )
    return out


def _tile(num_experts: int, sizes: tuple[int, int, int]) -> dict[str, int]:
    """What both kernels are compiled for."""
    rows, columns, summands = sizes
    experts = max(16, power_of_two(num_experts))
    return {"ROWS": rows, "COLUMNS": columns, "SUMMANDS": summands, "EXPERTS": experts, **LAUNCH}


@launch_directly
@jit
def _gate_up(
    x,
    order,
    matrices,
    out,
    ends,  # of these experts' rows, and
    before,  # with HAS_BEFORE, of those before them
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMANDS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    across = tl.cdiv(I, COLUMNS)
    expert, first, end = find_tile(
        ends, tl.program_id(0) // across, E, EXPERTS, ROWS, before, HAS_BEFORE
    )
    if expert >= E:
        return
    column = tl.program_id(0) % across * COLUMNS
    tile = expert, first, end, column
    if end - first > ROWS // 2:
        _gate_up_tile(x, order, matrices, out, tile, K, D, I, ROWS, COLUMNS, SUMMANDS)
    else:
        _gate_up_tile(x, order, matrices, out, tile, K, D, I, ROWS // 2, COLUMNS, SUMMANDS)


@jit
def _gate_up_tile(
    x,
    order,
    matrices,
    out,
    tile,  # expert, its first row and the end of its rows, first column
    K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    expert, first, end, column = tile
    row = first + tl.arange(0, ROWS)
    token = tl.load(order + row, mask=row < end, other=0) // K
    summand = tl.arange(0, SUMMANDS)
    rows = x + token[:, None] * D + summand[None, :]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    matrix = expert * 2 * I + column
    for done in range(0, D, SUMMANDS):
        if D % SUMMANDS == 0:
            value = tl.load(rows + done)
        else:
            value = tl.load(rows + done, mask=(summand < D - done)[None, :], other=0.0)
        gate = tl.dot(value, matrices.load([matrix, done]).T, gate)
        up = tl.dot(value, matrices.load([matrix + I, done]).T, up)
    inner = gate * tl.sigmoid(gate) * up
    place = column + tl.arange(0, COLUMNS)
    tl.store(
        out + row.to(tl.int64)[:, None] * I + place[None, :],
        inner.to(out.dtype.element_ty),
        mask=(row < end)[:, None] & (place < I)[None, :],
    )


@launch_directly
@jit
def _down(
    inner,
    order,
    matrices,
    out,
    ends,  # of these experts' rows, and
    before,  # with HAS_BEFORE, of those before them
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMANDS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    across = tl.cdiv(D, COLUMNS)
    expert, first, end = find_tile(
        ends, tl.program_id(0) // across, E, EXPERTS, ROWS, before, HAS_BEFORE
    )
    if expert >= E:
        return
    column = tl.program_id(0) % across * COLUMNS
    tile = expert, first, end, column
    if end - first > ROWS // 2:
        _down_tile(inner, order, matrices, out, tile, D, I, ROWS, COLUMNS, SUMMANDS)
    else:
        _down_tile(inner, order, matrices, out, tile, D, I, ROWS // 2, COLUMNS, SUMMANDS)


@jit
def _down_tile(
    inner,
    order,
    matrices,
    out,
    tile,  # expert, its first row and the end of its rows, first column
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMANDS: tl.constexpr,
):
    expert, first, end, column = tile
    row = first + tl.arange(0, ROWS)
    summand = tl.arange(0, SUMMANDS)
    rows = inner + tl.minimum(row, end - 1).to(tl.int64)[:, None] * I + summand[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    matrix = expert * D + column
    for done in range(0, I, SUMMANDS):
        if I % SUMMANDS == 0:
            value = tl.load(rows + done)
        else:
            value = tl.load(rows + done, mask=(summand < I - done)[None, :], other=0.0)
        total = tl.dot(value, matrices.load([matrix, done]).T, total)
    pair = tl.load(order + row, mask=row < end, other=0)
    place = column + tl.arange(0, COLUMNS)
    tl.store(
        out + pair[:, None] * D + place[None, :],
        total.to(out.dtype.element_ty),
        mask=(row < end)[:, None] & (place < D)[None, :],
    )
