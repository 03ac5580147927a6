"""The decode step of a model whose weights are packed, for more rows.

What is packed is multiplied by kernels that take words apart in registers; parts of the model in
16 bits are read as `many_rows.py` does. `packed_few_rows.py` has the step of few rows. Where one
product has too few outputs to keep a GPU busy, programs share its inputs, and the next norm adds
their parts up.

Shapes: B rows, D hidden size, N outputs, K inputs, E experts, I expert width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.decode.fixed_point import (
    FixedPoint,
    FixedProjection,
    TiledProjection,
    can_multiply,
)
from kimi_linear.decode.many_rows import ManyRowsStep, MatrixProjection
from kimi_linear.decode.packed_expert_kernels import packed_in_kernel, packed_out_kernel
from kimi_linear.decode.packed_kernels import packed_project_kernel
from kimi_linear.decode.step import linked
from kimi_linear.ops.packed.unpacking import form, planes, words_by_matrix
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.runtime import ceil_div, power_of_two

# rows of a tile, warps (twice as many for 16 columns of experts' tiles) and stages: of dense
# products, of those with more than `FEW_COLUMNS` tokens, and of both expert products
DENSE = (64, 2, 4)
MANY = (64, 4, 2)
EXPERTS = (64, 2, 3)
# columns of a tile: at least, and at most
MIN_COLUMNS, FEW_COLUMNS, MAX_COLUMNS = 8, 16, 64
# parts of a sum, at most
MAX_SPLITS = 8
# pairs by expert from which a tile has 16 columns, not 8
WIDE_PAIRS = 6


class PackedProjection(TiledProjection):
    """A `TiledProjection` for `num_rows` rows of input in 16 bits."""

    def __init__(
        self,
        weights: tuple[Tensor, ...],
        num_rows: int,
        is_linked: bool,
        up: Tensor | None = None,
    ) -> None:
        self.num_rows = num_rows
        self.columns = min(MAX_COLUMNS, max(MIN_COLUMNS, power_of_two(num_rows)))
        self.tile = MANY if self.columns > FEW_COLUMNS else DENSE
        super().__init__(weights, is_linked, up, self.tile[0], MAX_SPLITS)

    def launch(self, x: Tensor, out: Tensor) -> None:
        """out [B, width] = x [B, K] @ weights^T, or gated with `up`; out [B, splits, width] gets
        parts of the sum."""
        splits = out.shape[1] if out.dim() == 3 else 1
        rows, num_warps, num_stages = self.tile
        grid = (self.tiles.shape[0], splits, ceil_div(self.num_rows, self.columns))
        packed_project_kernel[grid](
            x,
            self.tiles,
            self.up_tiles,
            *planes(self.packed),
            out,
            self.num_rows,
            x.stride(0),
            out.stride(0),
            out.stride(1) if out.dim() == 3 else 0,
            K=self.size,
            SPLITS=splits,
            V=rows,
            M=self.columns,
            IS_GATED=self.up is not None,
            HAS_PLAIN=self.has_plain,
            FORM=form(self.packed, packed_project_kernel),
            num_warps=num_warps,
            num_stages=num_stages,
            **linked(self.is_linked),
        )


class SeveralProjections:
    """Weights of the same input that no single launch takes, one after the other."""

    def __init__(self, projections: list[Any]) -> None:
        self.projections = projections
        self.width = sum(each.width for each in projections)
        self.size = projections[0].size
        self.splits = 1

    def launch(self, x: Tensor, out: Tensor) -> None:
        start = 0
        for each in self.projections:
            each.launch(x, out[..., start : start + each.width])
            start += each.width


class GatedProjections:
    """Both halves of a gated MLP, which no single launch takes: one is plain, or packed otherwise.

    Args:
        gate, up: As `projection` makes them.
        like: A weight of either; says dtype and device.
    """

    def __init__(self, gate: Any, up: Any, num_rows: int, like: Tensor) -> None:
        self.gate, self.up, self.width, self.size = gate, up, gate.width, gate.size
        self.other = torch.empty(num_rows, up.width, dtype=like.dtype, device=like.device)

    def launch(self, x: Tensor, out: Tensor) -> None:
        self.gate.launch(x, out)
        self.up.launch(x, self.other)
        torch.mul(F.silu(out), self.other, out=out)


def projection(
    weights: tuple[Tensor, ...],
    num_rows: int,
    is_linked: bool,
    up: Tensor | None = None,
    fixed: FixedPoint | None = None,
    most_splits: int = 1,
) -> Any:
    """What multiplies by the weights: in one launch where all that are packed are so in one way.

    Args:
        fixed: The input in fixed point too; None: it is not there.
        most_splits: Parts of the sum that programs may share, at most, with `fixed`.
    """
    every = weights if up is None else (*weights, up)
    packed = [each for each in every if isinstance(each, PackedWeights)]
    if not packed:
        return MatrixProjection(weights, num_rows, is_linked, up=up)
    ways = {(each.scheme, each.scale.dtype) for each in packed}
    if len(ways) == 1 and (up is None or len(packed) == 2):
        if fixed is not None and can_multiply(packed[0]):
            return FixedProjection(weights, fixed, is_linked, up=up, most_splits=most_splits)
        return PackedProjection(weights, num_rows, is_linked, up=up)
    alone = [projection((each,), num_rows, is_linked, fixed=fixed) for each in every]
    if up is not None:
        gate, other = alone
        return GatedProjections(gate, other, num_rows, up)
    return SeveralProjections(alone)


class PackedManyRowsStep(ManyRowsStep):
    """As `ManyRowsStep`, with products by packed weights."""

    def _prepare_attention(self) -> None:
        super()._prepare_attention()
        self.most_splits = max(getattr(each, "splits", 1) for each in self.outputs)
        self.sum_parts = self._empty(self.num_rows * self.most_splits * self.config.hidden_size)

    def _projection(self, *weights: Tensor) -> Any:
        return projection(weights, self.num_rows, self.is_linked)

    def _gated_projection(self, gate: Tensor, up: Tensor) -> Any:
        return projection((gate,), self.num_rows, self.is_linked, up=up)

    def _add(self, projection: Any, x: Tensor) -> None:
        splits = min(getattr(projection, "splits", 1), self.most_splits)
        shape = self.num_rows, splits, self.config.hidden_size
        out = self.sum_parts[: math.prod(shape)].view(shape)  # rows side by side
        projection.launch(x, out[:, 0] if splits == 1 else out)
        self.to_add = out

    def _run_experts(self, i: int) -> None:
        experts = self.layers[i].block_sparse_moe.experts
        gate_up, down = experts.gate_up_proj, experts.down_proj
        if not isinstance(gate_up, PackedWeights):
            super()._run_experts(i)
            return
        self._group_pairs()
        self._launch_experts(packed_in_kernel, self.normed, (), gate_up, self.activations)
        self._launch_experts(
            packed_out_kernel,
            self.activations,
            (self.weights,),
            down,
            self.expert_parts,
            SLOTS=self.expert_parts.shape[1],
        )
        self._run_shared(i, self.expert_parts)

    def _launch_experts(
        self,
        kernel: Any,
        x: Tensor,
        others: tuple[Tensor, ...],
        weights: PackedWeights,
        out: Tensor,
        **sizes: int,
    ) -> None:
        """One of the experts' two products; `others` are the arguments before the weights."""
        config, pairs = self.config, self.num_rows * self.top
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        rows, num_warps, num_stages = EXPERTS
        widening = 2 if pairs >= WIDE_PAIRS * E else 1
        outputs = width if kernel is packed_in_kernel else D
        kernel[(ceil_div(outputs, rows), min(E, pairs))](
            x,
            self.order,
            self.begin,
            self.active,
            *others,
            *planes(weights),
            out,
            D=D,
            I=width,
            TOP=self.top,
            V=rows,
            M=widening * MIN_COLUMNS,
            FORM=form(weights, kernel),
            num_warps=widening * num_warps,
            num_stages=num_stages,
            **words_by_matrix(weights),
            **sizes,
            **linked(self.is_linked),
        )
