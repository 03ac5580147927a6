"""The decode step of few rows of a model whose weights are packed.

Norms and attention write their outputs in fixed point too, which packed weights multiply.

Shapes: B rows, K inputs, P inputs in whole blocks of 256, I expert width.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.decode.few_rows import FewRowsStep, cut
from kimi_linear.decode.fixed_expert_kernels import fixed_in_kernel, fixed_out_kernel
from kimi_linear.decode.fixed_point import FixedPoint, FixedProjection, Tile, can_multiply
from kimi_linear.decode.fixed_point_kernels import add_norm_fixed_kernel, add_norm_score_kernel
from kimi_linear.decode.packed import MAX_SPLITS, PackedManyRowsStep, projection
from kimi_linear.decode.step import linked
from kimi_linear.ops.packed.unpacking import form, planes, words_by_matrix
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.runtime import ceil_div, power_of_two
from kimi_linear.schemes import BLOCK, RUN

# Tiles of both expert products, by bits. The first product's hold gate and up in turn, and make
# whole runs of outputs; early are its shared experts alone: what the router chose is known when all
# before has ended.
EXPERTS_IN = {3: Tile(64, 4, 5, early=0), 4: Tile(64, 4, 3, early=1), 8: Tile(64, 4, 3, early=2)}
EXPERTS_OUT = {3: Tile(32, 2, 3, early=1), 4: Tile(32, 2, 4, early=1), 8: Tile(32, 2, 2, early=1)}
# experts that a program scores, and its warps
SCORE_BLOCK, SCORE_WARPS = 8, 8


class PackedFewRowsStep(PackedManyRowsStep):
    """What norms, attention and experts give to packed weights is in fixed point, where a program
    writes whole runs of it; small matrices are read by the kernels of few rows.

    Attributes:
        most_rows: Beyond, `PackedManyRowsStep` is faster.
        sums: [B, D] float32, the next `hidden`, which takes its place when it is written.
    """

    most_rows = 4
    hidden: Tensor
    sums: Tensor
    _project_gates = FewRowsStep._project_gates
    _absorb = FewRowsStep._absorb
    _mix = FewRowsStep._mix

    def __init__(self, model: nn.Module, *args: Any) -> None:
        weights = (each for each in model.parameters() if isinstance(each, PackedWeights))
        self.schemes = {(each.shape[-1], each.scheme) for each in weights}
        super().__init__(model, *args)

    def _fixed_point(self, num_rows: int, size: int) -> FixedPoint:
        """For all weights of so many inputs."""
        schemes = (scheme for inputs, scheme in self.schemes if inputs == size)
        return FixedPoint(num_rows, size, schemes, self.device)

    @functools.cached_property
    def fixed(self) -> FixedPoint:
        """What `normed` holds, in fixed point."""
        return self._fixed_point(self.num_rows, self.config.hidden_size)

    @functools.cached_property
    def fixed_outputs(self) -> dict[int, FixedPoint]:
        """What attention gives in fixed point, by its size."""
        return {}

    def _input_projection(self, *weights: Tensor) -> Any:
        return projection(weights, self.num_rows, self.is_linked, fixed=self.fixed)

    def _gated_projection(self, gate: Tensor, up: Tensor) -> Any:
        return projection((gate,), self.num_rows, self.is_linked, up=up, fixed=self.fixed)

    def _score_experts(self, i: int) -> None:
        """With the norm before: a launch of its own would take as long. The router's programs add
        up and norm for themselves, so the sums are not written to where they are read."""
        layer, parts = self.layers[i], self.to_add
        norm, router = layer.post_attention_layernorm, layer.block_sparse_moe.gate.weight
        self.to_add = None
        E, D = router.shape
        large, small = cut(D)
        add_norm_score_kernel[(self.num_rows + ceil_div(E, SCORE_BLOCK),)](
            self.hidden,
            self.hidden if parts is None else parts,
            norm.weight,
            router,
            self.sums,
            self.normed,
            *self.fixed.parts,
            self.router_logits,
            norm.eps,
            E,
            D=D,
            P=self.fixed.size,
            PLACES=power_of_two(D),
            LARGE=large,
            SMALL=small,
            PARTS=0 if parts is None else parts.shape[1],
            ROWS=self.num_rows,
            BLOCK=SCORE_BLOCK,
            num_warps=SCORE_WARPS,
            **linked(self.is_linked),
        )
        self.hidden, self.sums = self.sums, self.hidden

    def _add_norm(self, norm: Any, log: Tensor | None = None) -> None:
        self._launch_norm(add_norm_fixed_kernel, self.fixed.parts, norm, log, P=self.fixed.size)

    def _output_projection(self, weight: Tensor) -> Any:
        is_packed = isinstance(weight, PackedWeights) and can_multiply(weight)
        if not (is_packed and self._writes_runs()):
            return self._projection(weight)
        size = weight.shape[1]
        if size not in self.fixed_outputs:
            self.fixed_outputs[size] = self._fixed_point(self.num_rows, size)
        fixed = self.fixed_outputs[size]
        return projection((weight,), self.num_rows, self.is_linked, None, fixed, MAX_SPLITS)

    def _writes_runs(self) -> bool:
        """Whether the programs of attention write whole runs of outputs."""
        sizes = self.config.linear_attn_config["head_dim"], self.config.v_head_dim
        return all(size % RUN == 0 for size in sizes)

    def _fixed_output(self, i: int) -> tuple[tuple[Tensor, ...], int]:
        output = self.outputs[i]
        if not isinstance(output, FixedProjection):
            return super()._fixed_output(i)
        return output.x.parts, output.x.size

    def _run_experts(self, i: int) -> None:
        """A program for each pair of a row and an expert. The shared experts come with them, where
        they are packed too: a launch of their own would take as long."""
        experts = self.layers[i].block_sparse_moe.experts
        if not self._can_pair(experts):
            super()._run_experts(i)
            return
        gate_up, down = experts.gate_up_proj, experts.down_proj
        joined = self._joined_shared(i)
        num_shared = self.num_shared if joined else 0
        shared = joined or (gate_up, gate_up, down)
        pairs = self.num_rows * self.top
        sizes: dict[str, Any] = {
            "D": self.config.hidden_size,
            "I": self.config.moe_intermediate_size,
            "TOP": self.top,
            "NUM_SHARED": num_shared,
            "T": power_of_two(self.num_rows),
            **linked(self.is_linked),
        }
        self._launch_in(gate_up, shared[0], shared[1], pairs + num_shared, sizes)
        self._launch_out(down, shared[2], pairs + min(1, num_shared), sizes)
        self.to_add = self.expert_parts
        if not joined:
            self._run_shared(i, self.expert_parts)

    def _launch_in(
        self,
        gate_up: PackedWeights,
        shared_gate: PackedWeights,
        shared_up: PackedWeights,
        programs: int,
        sizes: dict[str, Any],
    ) -> None:
        """silu(gate) * up of all pairs; `programs` for each tile of outputs."""
        tile = EXPERTS_IN[gate_up.scheme.bits]
        fixed_in_kernel[(ceil_div(sizes["I"], tile.rows // 2), programs)](
            *self.fixed.parts,
            self.experts,
            *planes(gate_up),
            *self.inner.parts,
            *self.shared_inner.parts,
            *planes(shared_gate),
            *planes(shared_up),
            self.num_rows,
            FORM=form(gate_up, fixed_in_kernel),
            SHARED_FORM=form(shared_gate, fixed_in_kernel),
            **tile.options(sizes["T"], ceil_div(sizes["D"], BLOCK)),
            **words_by_matrix(gate_up),
            **sizes,
        )

    def _launch_out(
        self,
        down: PackedWeights,
        shared_down: PackedWeights,
        programs: int,
        sizes: dict[str, Any],
    ) -> None:
        """Weighted outputs of all pairs, side by side; `programs` for each tile of outputs."""
        tile = EXPERTS_OUT[down.scheme.bits]
        fixed_out_kernel[(ceil_div(sizes["D"], tile.rows), programs)](
            *self.inner.parts,
            *self.shared_inner.parts,
            self.experts,
            self.weights,
            *planes(down),
            self.expert_parts,
            *planes(shared_down),
            self.num_rows,
            SLOTS=self.expert_parts.shape[1],
            FORM=form(down, fixed_out_kernel),
            SHARED_FORM=form(shared_down, fixed_out_kernel),
            **tile.options(sizes["T"], ceil_div(sizes["I"], BLOCK)),
            **words_by_matrix(down),
            **sizes,
        )

    def _can_pair(self, experts: Any) -> bool:
        """Whether experts' outputs are whole runs, and both products are packed."""
        weights = experts.gate_up_proj, experts.down_proj
        is_packed = all(isinstance(each, PackedWeights) and can_multiply(each) for each in weights)
        return is_packed and self.config.moe_intermediate_size % RUN == 0

    def _prepare_experts(self) -> None:
        super()._prepare_experts()
        self.sums = torch.empty_like(self.hidden)
        width = self.config.moe_intermediate_size
        self.inner = self._fixed_point(self.num_rows * self.top, width)
        shared_width = max(1, self.num_shared) * width
        self.shared_inner = self._fixed_point(self.num_rows, shared_width)

    def _joined_shared(self, i: int) -> tuple[PackedWeights, ...] | None:
        """Gate, up and down of shared experts that the experts' launches take too."""
        if not self.num_shared:
            return None
        mlp = self.layers[i].block_sparse_moe.shared_experts
        weights = tuple(each.weight for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        if not all(isinstance(each, PackedWeights) and can_multiply(each) for each in weights):
            return None
        gate, up, _ = weights
        is_alike = gate.scheme == up.scheme and gate.scale.dtype == up.scale.dtype
        return weights if is_alike else None
