"""The decode step of a model whose weights are packed, for any number of rows.

What is packed is multiplied by kernels that take words apart in registers; parts of the model in
16 bits are read as `many_rows.py` does. Where one product has too few outputs to keep a GPU busy,
programs share its inputs, and the next norm adds their parts up.

Shapes: B rows, D hidden size, N outputs, K inputs, E experts, I expert width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.decode.few_rows import FewRowsStep
from kimi_linear.decode.many_rows import ManyRowsStep, MatrixProjection
from kimi_linear.decode.packed_kernels import (
    packed_in_kernel,
    packed_out_kernel,
    packed_project_kernel,
)
from kimi_linear.decode.step import linked
from kimi_linear.ops.packed.unpacking import form, has_asm, planes
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.runtime import ceil_div, power_of_two
from kimi_linear.schemes import BLOCK

# outputs of a tile, warps and stages: of dense products, and of both expert products
PROJECT = (32, 2, 4)
EXPERTS_IN = (16, 1, 3)
EXPERTS_OUT = (32, 2, 4)
# columns (tokens) of a tile
MAX_COLUMNS = 64
# programs that keep a GPU of about 130 multiprocessors busy, and blocks that each has at least
PROGRAMS, MIN_BLOCKS = 528, 2
# pairs by expert from which a tile has 16 columns, not 8
WIDE_PAIRS = 6


def is_packed(model: nn.Module) -> bool:
    """Whether some of the model's weights are packed."""
    return any(isinstance(each, PackedWeights) for each in model.parameters())


def columns_of(num_rows: int) -> int:
    """Columns of a tile for so many tokens."""
    return min(MAX_COLUMNS, max(8, power_of_two(num_rows)))


class PackedProjection:
    """Weights [n, K] of the same input, packed in one way or plain; outputs come side by side.

    Args:
        weights: At least one is packed.
        num_rows: B.
        is_linked: See `linked`.
        up: A weight like a single one: out is silu(x @ weight^T) * (x @ up^T).
    """

    def __init__(
        self,
        weights: tuple[Tensor, ...],
        num_rows: int,
        is_linked: bool,
        up: Tensor | None = None,
    ) -> None:
        self.weights, self.num_rows, self.is_linked, self.up = weights, num_rows, is_linked, up
        self.width = sum(weight.shape[0] for weight in weights)
        self.size = weights[0].shape[1]
        self.packed = next(each for each in weights if isinstance(each, PackedWeights))
        self.has_plain = not all(isinstance(each, PackedWeights) for each in weights)
        self.tiles = self._tiles(weights)
        self.up_tiles = self.tiles if up is None else self._tiles((up,))
        blocks = ceil_div(self.size, BLOCK)
        wanted = ceil_div(PROGRAMS, self.tiles.shape[0])
        self.parts = max(1, min(wanted, blocks // MIN_BLOCKS, 8))

    def _tiles(self, weights: tuple[Tensor, ...]) -> Tensor:
        """Rows for the kernel, see `packed_project_kernel`."""
        tiles, column, block = [], 0, PROJECT[0]
        for weight in weights:
            if isinstance(weight, PackedWeights):
                low, high, scale, zero = (part.data_ptr() for part in planes(weight))
                place = [low, high, scale, zero, weight.scale.shape[-2]]
            else:
                place = [weight.data_ptr(), 0, 0, 0, 0]
            rows = weight.shape[0]
            for start in range(0, rows, block):
                tiles.append([*place, start, min(block, rows - start), column + start])
            column += rows
        return torch.tensor(tiles, dtype=torch.int64, device=self.packed.device)

    def launch(self, x: Tensor, out: Tensor) -> None:
        """out [B, width] = x [B, K] @ weights^T, or gated with `up`; out [B, parts, width] gets
        parts of the sum."""
        parts = out.shape[1] if out.dim() == 3 else 1
        block, num_warps, num_stages = PROJECT
        columns = columns_of(self.num_rows)
        low, high, scale, zero = planes(self.packed)
        grid = (self.tiles.shape[0], parts, ceil_div(self.num_rows, columns))
        packed_project_kernel[grid](
            x,
            self.tiles,
            self.up_tiles,
            low,
            high,
            scale,
            zero,
            out,
            self.num_rows,
            x.stride(0),
            out.stride(0),
            out.stride(1) if out.dim() == 3 else 0,
            K=self.size,
            SHARED=self.packed.scheme.rows,
            PARTS=parts,
            N=block,
            M=columns,
            IS_GATED=self.up is not None,
            HAS_PLAIN=self.has_plain,
            ASM=has_asm(packed_project_kernel, x.device),
            num_warps=num_warps,
            num_stages=num_stages,
            **form(self.packed),
            **linked(self.is_linked),
        )


class SeveralProjections:
    """Weights of the same input that no single launch takes, one after the other."""

    def __init__(self, projections: list[Any]) -> None:
        self.projections = projections
        self.width = sum(each.width for each in projections)
        self.size = projections[0].size
        self.parts = 1

    def launch(self, x: Tensor, out: Tensor) -> None:
        start = 0
        for each in self.projections:
            each.launch(x, out[..., start : start + each.width])
            start += each.width


def projection(
    weights: tuple[Tensor, ...], num_rows: int, is_linked: bool, up: Tensor | None = None
) -> Any:
    """What multiplies by the weights: in one launch where all that are packed are so in one way."""
    every = weights if up is None else (*weights, up)
    packed = [each for each in every if isinstance(each, PackedWeights)]
    if not packed:
        return MatrixProjection(weights, num_rows, is_linked, up=up)
    ways = {(each.scheme, each.scale.dtype) for each in packed}
    if len(ways) == 1 and (up is None or len(packed) == 2):
        return PackedProjection(weights, num_rows, is_linked, up=up)
    return SeveralProjections([projection((each,), num_rows, is_linked) for each in weights])


class PackedManyRowsStep(ManyRowsStep):
    """As `ManyRowsStep`, with products by packed weights."""

    is_sorted = True

    def _prepare_attention(self) -> None:
        super()._prepare_attention()
        parts = max(getattr(each, "parts", 1) for each in self.outputs)
        self.attention_parts = self._empty(self.num_rows, parts, self.config.hidden_size)

    def _projection(self, *weights: Tensor) -> Any:
        return projection(weights, self.num_rows, self.is_linked)

    def _gated_projection(self, gate: Tensor, up: Tensor) -> Any:
        return projection((gate,), self.num_rows, self.is_linked, up=up)

    def _add(self, projection: Any, x: Tensor) -> None:
        parts = getattr(projection, "parts", 1)
        out = self.branch_out if parts == 1 else self.attention_parts[:, :parts]
        projection.launch(x, out[:, 0] if parts == 1 else out)
        self.to_add = out

    def _run_experts(self, i: int) -> None:
        experts = self.layers[i].block_sparse_moe.experts
        gate_up, down = experts.gate_up_proj, experts.down_proj
        if not (isinstance(gate_up, PackedWeights) and isinstance(down, PackedWeights)):
            super()._run_experts(i)
            return
        pairs = self.num_rows * self.top
        if self.is_sorted:
            self._group_pairs()
        E, width = self.config.num_experts, self.config.moe_intermediate_size
        most = min(E, pairs) if self.is_sorted else pairs
        chosen = (self.experts, self.order, self.begin, self.active)
        parts, D = self.expert_parts, self.config.hidden_size
        sizes: dict[str, Any] = {
            "D": D,
            "I": width,
            "TOP": self.top,
            "M": 16 if pairs >= WIDE_PAIRS * E else 8,
            "IS_SORTED": self.is_sorted,
            "ASM": has_asm(packed_in_kernel, self.device),
            **linked(self.is_linked),
        }
        block, num_warps, num_stages = EXPERTS_IN
        packed_in_kernel[(ceil_div(width, block), most)](
            self.normed,
            *chosen,
            *planes(gate_up),
            self.activations,
            SCALE_WORDS=gate_up.scale.shape[1],
            ZERO_WORDS=1 if gate_up.zero is None else gate_up.zero.shape[1],
            SHARED=gate_up.scheme.rows,
            N=block,
            num_warps=num_warps,
            num_stages=num_stages,
            **form(gate_up),
            **sizes,
        )
        block, num_warps, num_stages = EXPERTS_OUT
        packed_out_kernel[(ceil_div(D, block), most)](
            self.activations,
            *chosen,
            self.weights,
            *planes(down),
            parts,
            PARTS=parts.shape[1],
            SCALE_WORDS=down.scale.shape[1],
            ZERO_WORDS=1 if down.zero is None else down.zero.shape[1],
            SHARED=down.scheme.rows,
            N=block,
            num_warps=num_warps,
            num_stages=num_stages,
            **form(down),
            **sizes,
        )
        self._run_shared(i, parts)


class PackedFewRowsStep(PackedManyRowsStep):
    """Small matrices by the kernels of few rows, and a pair of row and expert by program."""

    kda_block, kda_warps = FewRowsStep.kda_block, FewRowsStep.kda_warps
    is_sorted = False
    _project_gates = FewRowsStep._project_gates
    _absorb = FewRowsStep._absorb
    _mix = FewRowsStep._mix
