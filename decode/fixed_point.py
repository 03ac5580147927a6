"""Inputs in fixed point, and dense products of packed weights by them, for a few rows.

Shapes: B rows, N outputs, K inputs, P inputs in whole blocks of 256.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_linear.decode.fixed_product_kernels import fixed_project_kernel
from kimi_linear.decode.step import linked
from kimi_linear.ops.packed.unpacking import form, planes
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.runtime import ceil_div, power_of_two
from kimi_linear.schemes import BLOCK, RUN, Scheme


@dataclass(frozen=True)
class Tile:
    """How the programs of a product read weights, by measurements of the whole step on an H200.

    Attributes:
        rows: Of the weights.
        warps: For one or two tokens; for more, twice as many.
        stages: Loads that are under way.
        early: Blocks of codes that are read while the kernel before still runs, for one token; for
            more, registers hold fewer.
        at_once: Blocks that a step of the loop multiplies by.
        prefetch: What the second cache reads before the inputs are there: 1 scales, 2 codes too.
    """

    rows: int
    warps: int
    stages: int
    early: int
    at_once: int = 1
    prefetch: int = 0

    def options(self, tokens: int, blocks: int) -> dict[str, int]:
        """Arguments of a launch for `tokens` tokens, whose programs read `blocks` blocks each."""
        is_few = tokens <= 2
        return {
            "V": self.rows,
            "EARLY": min(self.early // tokens, blocks),
            "AT_ONCE": self.at_once,
            "PREFETCH": self.prefetch,
            "num_warps": self.warps if is_few else 2 * self.warps,
            "num_stages": self.stages,
        }


FLOAT8, INTEGERS = Tile(32, 2, 5, early=0), Tile(32, 2, 4, early=3)
# programs that keep a GPU of about 130 multiprocessors busy, and blocks that each has at least
PROGRAMS, MIN_BLOCKS = 528, 2


def can_multiply(weights: PackedWeights) -> bool:
    """Whether these codes are integers, or float8 numbers that the device widens."""
    if weights.scheme.is_float and weights.is_cuda:
        return torch.cuda.get_device_capability(weights.device) >= (8, 9)
    return True


class FixedPoint:
    """Rows of inputs as integers of 16 bits, as weights of some schemes want them.

    Args:
        num_rows: B.
        num_inputs: K.
        schemes: Of the weights.
        device: Where.

    Attributes:
        size: P.
        parts: Columns int8 [B, 8, P] and float16 [B, 4, P], halves int8 [B, 2, P], unit float32
            [B, P / 32], see `store_fixed_point`; None for those that no scheme wants.
    """

    def __init__(
        self, num_rows: int, num_inputs: int, schemes: Iterable[Scheme], device: torch.device
    ) -> None:
        self.size = ceil_div(num_inputs, BLOCK) * BLOCK
        wanted = {1 if each.is_float else 2 if each.bits == 3 else 0 for each in schemes}
        sizes = (8, torch.int8), (4, torch.float16), (2, torch.int8)
        columns = (
            torch.zeros(num_rows, each, self.size, dtype=dtype, device=device)
            if i in wanted
            else None
            for i, (each, dtype) in enumerate(sizes)
        )
        unit = torch.zeros(num_rows, self.size // RUN, device=device)
        self.parts: tuple[Any, ...] = *columns, unit


class TiledProjection:
    """Weights [n, K] of the same input, packed in one way or plain; outputs come side by side.

    Args:
        weights: At least one is packed.
        is_linked: See `linked`.
        up: A weight like a single one: out is silu(x @ weight^T) * (x @ up^T).
        rows: Of a tile.
        most_splits: Parts of the sum that programs may share, at most.
    """

    def __init__(
        self,
        weights: tuple[Tensor, ...],
        is_linked: bool,
        up: Tensor | None,
        rows: int,
        most_splits: int,
    ) -> None:
        self.weights, self.is_linked, self.up = weights, is_linked, up
        self.width = sum(weight.shape[0] for weight in weights)
        self.size = weights[0].shape[1]
        self.packed = next(each for each in weights if isinstance(each, PackedWeights))
        self.has_plain = not all(isinstance(each, PackedWeights) for each in weights)
        self.tiles = packed_tiles(weights, rows)
        self.up_tiles = self.tiles if up is None else packed_tiles((up,), rows)
        wanted = ceil_div(PROGRAMS, self.tiles.shape[0])
        most = ceil_div(self.size, BLOCK) // MIN_BLOCKS
        self.splits = max(1, min(wanted, most, most_splits))


class FixedProjection(TiledProjection):
    """A `TiledProjection` of an input in fixed point, `x`."""

    def __init__(
        self,
        weights: tuple[Tensor, ...],
        x: FixedPoint,
        is_linked: bool,
        up: Tensor | None = None,
        most_splits: int = 1,
    ) -> None:
        packed = next(each for each in weights if isinstance(each, PackedWeights))
        self.x, self.tile = x, FLOAT8 if packed.scheme.is_float else INTEGERS
        super().__init__(weights, is_linked, up, self.tile.rows, most_splits)

    def launch(self, x: Tensor, out: Tensor) -> None:
        """out [B, width] = x [B, K] @ weights^T, or gated with `up`; x is what `self.x` holds.
        out [B, splits, width] gets parts of the sum."""
        splits = out.shape[1] if out.dim() == 3 else 1
        tokens = power_of_two(x.shape[0])
        share = ceil_div(ceil_div(self.size, BLOCK), splits)
        fixed_project_kernel[(self.tiles.shape[0], splits)](
            x,
            *self.x.parts,
            self.tiles,
            self.up_tiles,
            *planes(self.packed),
            out,
            x.shape[0],
            x.stride(0),
            out.stride(0),
            out.stride(1) if splits > 1 else 0,
            K=self.size,
            SPLITS=splits,
            T=tokens,
            IS_GATED=self.up is not None,
            HAS_PLAIN=self.has_plain,
            FORM=form(self.packed, fixed_project_kernel),
            **self.tile.options(tokens, share),
            **linked(self.is_linked),
        )


def packed_tiles(weights: tuple[Tensor, ...], block: int) -> Tensor:
    """int64 [tiles, 8], for `packed_project_kernel` and `fixed_project_kernel`; plain weights take
    twice the memory, so half the rows."""
    tiles, column = [], 0
    for weight in weights:
        if isinstance(weight, PackedWeights):
            low, high, scale, zero = (part.data_ptr() for part in planes(weight))
            place, rows = [low, high, scale, zero, weight.scale.shape[-2]], block
        else:
            place, rows = [weight.data_ptr(), 0, 0, 0, 0], max(1, block // 2)
        size = weight.shape[0]
        for start in range(0, size, rows):
            tiles.append([*place, start, min(rows, size - start), column + start])
        column += size
    return torch.tensor(tiles, dtype=torch.int64, device=weights[0].device)
