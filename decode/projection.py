"""Weights that a decode step applies to the same input, by the launch that fits the number of rows.

Shapes: B rows, D input size, n output size of one weight.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from kimi_linear.decode.kernels import project_kernel, project_many_kernel
from kimi_linear.ops.runtime import power_of_two
from torch import Tensor

FEW_ROWS = 4
# rows up to which several weights are applied in one launch; beyond, cuBLAS takes one by one
SOME_ROWS = 64
# bytes of weights that a program of a matrix-vector kernel reads
TILE_BYTES, TILE_WARPS = 40 << 10, 4
# programs that keep a GPU of about 130 multiprocessors busy
PROGRAMS = 128


def cut(size: int) -> tuple[int, int]:
    """A row's length as a power of two and, in a power of two of places, what is left of it."""
    large = 1 << (size.bit_length() - 1)
    return large, power_of_two(size - large) if size > large else 0


def can_link(device: torch.device) -> bool:
    """Whether kernels may start early: from compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def linked(is_linked: bool) -> dict[str, bool]:
    """Arguments of a kernel that may start before the one before it has ended."""
    return {"IS_LINKED": True, "launch_pdl": True} if is_linked else {"IS_LINKED": False}


def _tiles(weights: Sequence[Tensor], block: int, x_columns: Sequence[int] = ()) -> Tensor:
    """A row of `project_kernel`'s table for every `block` rows of the weights."""
    tiles, column = [], 0
    for i, weight in enumerate(weights):
        size, x_column = weight.shape[0], x_columns[i] if x_columns else 0
        for start in range(0, size, block):
            count = min(block, size - start)
            tiles.append([weight[start].data_ptr(), count, column + start, x_column])
        column += size
    return torch.tensor(tiles, dtype=torch.int64, device=weights[0].device)


class Projection:
    """Weights [n, D] that are applied to the same input, their outputs side by side.

    Args:
        weights: The weights, contiguous.
        num_rows: B.
        is_linked: See `linked`.
        x_columns: Where each weight's input begins in the rows of x; the same for all if not given.
        ups: As many weights of the same shapes: out is silu(x @ weights^T) * (x @ ups^T).
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        num_rows: int,
        is_linked: bool,
        x_columns: Sequence[int] = (),
        ups: Sequence[Tensor] = (),
    ) -> None:
        self.weights, self.is_linked, self.ups = list(weights), is_linked, list(ups)
        self.x_columns = list(x_columns) or [0] * len(self.weights)
        self.width = sum(weight.shape[0] for weight in weights)
        self.size, self.num_rows = weights[0].shape[1], num_rows
        if num_rows <= FEW_ROWS:
            block = max(1, min(TILE_BYTES // (2 * self.size), self.width // PROGRAMS))
            self.block = 1 << (block.bit_length() - 1)
        else:
            self.block = 32
        self.tiles = _tiles(weights, self.block, self.x_columns)
        self.up_tiles = _tiles(ups, self.block)[:, 0].contiguous() if ups else self.tiles

    def launch_norm(
        self,
        x: Tensor,
        out: Tensor,
        *,
        norm: Any | None = None,
        residual: Tensor | None = None,
        table: Tensor | None = None,
        counters: Tensor | None = None,
    ) -> None:
        """For few rows: out [B, width] = norm(x [B, D]) @ weights^T + residual."""
        large, small = cut(self.size)
        project_kernel[(self.tiles.shape[0],)](
            x,
            x if norm is None else norm.weight,
            self.tiles,
            self.weights[0],
            x if residual is None else residual,
            out,
            x if table is None else table,
            x if counters is None else counters,
            x.stride(0),
            out.stride(0),
            0.0 if norm is None else norm.eps,
            self.width,
            D=self.size,
            LARGE=large,
            SMALL=small,
            ROWS=self.num_rows,
            BLOCK=self.block,
            HAS_TILES=len(self.weights) > 1,
            HAS_NORM=norm is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_LOG=table is not None,
            num_warps=TILE_WARPS,
            **linked(self.is_linked),
        )

    def launch(self, x: Tensor, out: Tensor) -> None:
        """For more rows: out [B, width] = x [B, ..] @ weights^T, or gated with `ups`."""
        is_single = len(self.weights) == 1 and not self.ups
        if self.num_rows > SOME_ROWS or is_single:
            self._launch_each(x, out)
            return
        project_many_kernel[(self.tiles.shape[0],)](
            x,
            self.tiles,
            self.up_tiles,
            self.weights[0],
            out,
            self.num_rows,
            x.stride(0),
            out.stride(0),
            D=self.size,
            ROWS=max(16, power_of_two(self.num_rows)),
            BLOCK=self.block,
            STEP=min(128, max(16, power_of_two(self.size))),
            IS_GATED=bool(self.ups),
            num_warps=4,
            num_stages=4,
            **linked(self.is_linked),
        )

    def _launch_each(self, x: Tensor, out: Tensor) -> None:
        start = 0
        for weight, column in zip(self.weights, self.x_columns, strict=True):
            stop = start + weight.shape[0]
            source = x[:, column : column + self.size]
            torch.mm(source, weight.t(), out=out[:, start:stop])
            start = stop
        if self.ups:
            (up,) = self.ups
            torch.mul(F.silu(out), torch.mm(x, up.t()), out=out)


__all__ = [
    "FEW_ROWS",
    "Projection",
    "can_link",
    "cut",
    "linked",
]
