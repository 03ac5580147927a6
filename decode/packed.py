"""The decode step of a model whose weights are packed, for any number of rows.

What is packed is multiplied by kernels that take words apart in registers; parts of the model in
16 bits are read as `many_rows.py` does. Where one product has too few outputs to keep a GPU busy,
programs share its inputs, and the next norm adds their parts up.

Shapes: B rows, D hidden size, N outputs, K inputs, E experts, I expert width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.decode.few_rows import FEW_ROWS, FewRowsStep, VectorProjection, power_below
from kimi_linear.decode.many_rows import ManyRowsStep, MatrixProjection
from kimi_linear.decode.packed_expert_kernels import packed_in_kernel, packed_out_kernel
from kimi_linear.decode.packed_kernels import packed_project_kernel
from kimi_linear.decode.step import linked
from kimi_linear.ops.packed.unpacking import form, planes
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.runtime import ceil_div, power_of_two
from kimi_linear.schemes import BLOCK

# rows of a tile, warps and stages: of dense products whose outputs fill a GPU without parts, of
# others, of those with more than `FEW_COLUMNS` tokens, and of both expert products
WHOLE = (32, 2, 5)
CUT = (64, 2, 4)
MANY = (64, 4, 2)
EXPERTS_IN = (64, 2, 3)
EXPERTS_OUT = (64, 2, 3)
# columns of a tile: at least, and at most
MIN_COLUMNS, FEW_COLUMNS, MAX_COLUMNS = 8, 16, 64
# parts into which inputs are cut, at most
MAX_PARTS = 4
# programs that keep a GPU of about 130 multiprocessors busy, and blocks that each has at least
PROGRAMS, MIN_BLOCKS = 528, 2
# pairs by expert from which a tile has 16 columns, not 8
WIDE_PAIRS = 6


def columns_of(num_rows: int) -> int:
    """Columns of a tile for so many tokens."""
    return min(MAX_COLUMNS, max(MIN_COLUMNS, power_of_two(num_rows)))


def parts_of(num_rows: int, num_inputs: int) -> int:
    """Into how many parts the inputs of so few rows are cut."""
    most = min(MAX_PARTS, MIN_COLUMNS // power_of_two(num_rows), num_inputs // BLOCK // 2)
    return power_below(most)


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
        blocks = ceil_div(self.size, BLOCK)
        is_whole = self.width >= PROGRAMS // 2 * WHOLE[0]
        self.columns = columns_of(num_rows)
        if self.columns > FEW_COLUMNS:
            self.tile = MANY
        else:
            self.tile = WHOLE if is_whole and num_rows <= FEW_ROWS else CUT
        self.parts = 1 if is_whole else parts_of(num_rows, self.size)
        self.tiles = self._tiles(weights)
        self.up_tiles = self.tiles if up is None else self._tiles((up,))
        wanted = ceil_div(PROGRAMS, self.tiles.shape[0])
        self.splits = max(1, min(wanted, blocks // MIN_BLOCKS // self.parts, 8))

    def _tiles(self, weights: tuple[Tensor, ...]) -> Tensor:
        """Rows for the kernel, see `packed_project_kernel`."""
        tiles, column, block = [], 0, self.tile[0] // self.parts
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
        """out [B, width] = x [B, K] @ weights^T, or gated with `up`; out [B, splits, width] gets
        parts of the sum."""
        splits = out.shape[1] if out.dim() == 3 else 1
        rows, num_warps, num_stages = self.tile
        low, high, scale, zero = planes(self.packed)
        grid = (self.tiles.shape[0], splits, ceil_div(self.num_rows * self.parts, self.columns))
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
            SPLITS=splits,
            V=rows,
            M=self.columns,
            PARTS=self.parts,
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
    alone = [projection((each,), num_rows, is_linked) for each in every]
    if up is not None:
        gate, other = alone
        return GatedProjections(gate, other, num_rows, up)
    return SeveralProjections(alone)


class PackedManyRowsStep(ManyRowsStep):
    """As `ManyRowsStep`, with products by packed weights."""

    is_sorted = True

    def _prepare_attention(self) -> None:
        super()._prepare_attention()
        splits = max(getattr(each, "splits", 1) for each in self.outputs)
        self.attention_parts = self._empty(self.num_rows, splits, self.config.hidden_size)

    def _projection(self, *weights: Tensor) -> Any:
        return projection(weights, self.num_rows, self.is_linked)

    def _gated_projection(self, gate: Tensor, up: Tensor) -> Any:
        return projection((gate,), self.num_rows, self.is_linked, up=up)

    def _add(self, projection: Any, x: Tensor) -> None:
        splits = getattr(projection, "splits", 1)
        out = self.branch_out if splits == 1 else self.attention_parts[:, :splits]
        projection.launch(x, out[:, 0] if splits == 1 else out)
        self.to_add = out

    def _run_experts(self, i: int) -> None:
        experts = self.layers[i].block_sparse_moe.experts
        gate_up, down = experts.gate_up_proj, experts.down_proj
        if not (isinstance(gate_up, PackedWeights) and isinstance(down, PackedWeights)):
            super()._run_experts(i)
            return
        if self.is_sorted:
            self._group_pairs()
        shared = self._joined_shared(i)
        first = [gate_up] if shared is None else shared[:2]
        num_shared = 0 if shared is None else self.num_shared
        self._launch_experts(
            packed_in_kernel,
            EXPERTS_IN,
            (self.normed,),
            gate_up,
            (self.activations, *planes(first[0]), *planes(first[-1]), self.mlp_inner),
            first[0],
            more_programs=num_shared,
            NUM_SHARED=num_shared,
        )
        second, out = down if shared is None else shared[2], self.expert_parts
        self._launch_experts(
            packed_out_kernel,
            EXPERTS_OUT,
            (self.activations, self.weights),
            down,
            (out, self.mlp_inner, *planes(second)),
            second,
            more_programs=min(1, num_shared),
            NUM_SHARED=num_shared,
            SLOTS=out.shape[1],
        )
        if shared is None:
            self._run_shared(i, out)
        self.to_add = out

    def _launch_experts(
        self,
        kernel: Any,
        tile: tuple[int, int, int],
        inputs: tuple[Tensor, ...],
        weights: PackedWeights,
        others: tuple[Tensor, ...],
        shared: PackedWeights,
        more_programs: int,
        **sizes: int,
    ) -> None:
        """One of the experts' two products.

        Args:
            inputs: The first arguments but for what was chosen, which comes after x.
            others: The arguments behind the weights.
            shared: The shared experts' weights, or any.
            more_programs: For each tile of outputs, beside those of the pairs or experts.
        """
        config, pairs, num_inputs = self.config, self.num_rows * self.top, weights.shape[2]
        E, D, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        rows, num_warps, num_stages = tile
        parts, zero = self._expert_parts(num_inputs), weights.zero
        outputs = width if kernel is packed_in_kernel else D
        programs = (min(E, pairs) if self.is_sorted else pairs) + more_programs
        kernel[(ceil_div(outputs, rows // parts), programs)](
            inputs[0],
            self.experts,
            self.order,
            self.begin,
            self.active,
            *inputs[1:],
            *planes(weights),
            *others,
            self.num_rows,
            D=D,
            I=width,
            TOP=self.top,
            SCALE_WORDS=weights.scale.shape[1],
            ZERO_WORDS=1 if zero is None else zero.shape[1],
            V=rows,
            M=2 * MIN_COLUMNS if pairs >= WIDE_PAIRS * E else MIN_COLUMNS,
            PARTS=parts,
            IS_SORTED=self.is_sorted,
            FORM=form(weights, kernel),
            SHARED_FORM=form(shared, kernel),
            num_warps=num_warps,
            num_stages=num_stages,
            **sizes,
            **linked(self.is_linked),
        )

    def _expert_parts(self, num_inputs: int) -> int:
        """Into how many parts an expert's inputs are cut."""
        return 1

    def _joined_shared(self, i: int) -> list[PackedWeights] | None:
        """Gate, up and down of shared experts that the experts' launches take too."""
        return None


class PackedFewRowsStep(PackedManyRowsStep):
    """Small matrices by the kernels of few rows, and a pair of row and expert by program."""

    kda_block, kda_warps = FewRowsStep.kda_block, FewRowsStep.kda_warps
    is_sorted = False
    _project_gates = FewRowsStep._project_gates
    _absorb = FewRowsStep._absorb
    _mix = FewRowsStep._mix

    def _prepare_experts(self) -> None:
        super()._prepare_experts()
        self.routers = [
            VectorProjection((layer.block_sparse_moe.gate.weight,), self.num_rows, self.is_linked)
            if layer.is_moe
            else None
            for layer in self.layers
        ]

    def _score_experts(self, i: int) -> None:
        self._add_norm(self.layers[i].post_attention_layernorm)
        router = self.routers[i]
        assert router is not None
        router.launch(self.normed, self.router_logits)

    def _expert_parts(self, num_inputs: int) -> int:
        return parts_of(1, num_inputs)

    def _joined_shared(self, i: int) -> list[PackedWeights] | None:
        if not self.num_shared:
            return None
        mlp = self.layers[i].block_sparse_moe.shared_experts
        weights = [each.weight for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        if not all(isinstance(each, PackedWeights) for each in weights):
            return None
        gate, up = weights[:2]
        is_alike = gate.scheme == up.scheme and gate.scale.dtype == up.scale.dtype
        return weights if is_alike else None
