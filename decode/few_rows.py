"""The decode step of few rows: matrix-vector kernels read each weight once, with norms, activations
and residuals inside.

Shapes: B rows, D hidden size, n output size of one weight, I expert width, S slots of a row: its
experts and the shared ones.
"""

from typing import Any

from torch import Tensor

from kimi_linear.decode.expert_kernels import experts_in_kernel, experts_out_kernel
from kimi_linear.decode.projection_kernels import project_kernel
from kimi_linear.decode.step import DecodeStep, linked, weight_tiles
from kimi_linear.ops.runtime import power_of_two

# bytes of weights that a program reads, and its warps
TILE_BYTES, TILE_WARPS = 32 << 10, 4
# programs that keep a GPU of about 130 multiprocessors busy
PROGRAMS = 128
# bytes, or rows, of experts' weights that a program reads, and its warps
IN_BYTES, IN_WARPS = 40 << 10, 4
OUT_BLOCK, OUT_WARPS = 4, 4
# values of a head, of a program that joins shares; shares that it loads at once; its warps
MIX_BLOCK, MIX_GROUP, MIX_WARPS = 64, 32, 8


def cut(size: int) -> tuple[int, int]:
    """A row's length as a power of two and, in a power of two of places, what is left of it."""
    large = 1 << (size.bit_length() - 1)
    return large, power_of_two(size - large) if size > large else 0


def power_below(size: int) -> int:
    """The largest power of two up to `size`, at least 1."""
    return 1 << (max(1, size).bit_length() - 1)


class VectorProjection:
    """Weights [n, D] of the same input, read row by row; their outputs come side by side.

    Args:
        weights: Contiguous.
        num_rows: B.
        is_linked: See `linked`.
    """

    def __init__(self, weights: tuple[Tensor, ...], num_rows: int, is_linked: bool) -> None:
        self.weights, self.num_rows, self.is_linked = weights, num_rows, is_linked
        self.width = sum(weight.shape[0] for weight in weights)
        self.size = weights[0].shape[1]
        self.block = power_below(min(TILE_BYTES // (2 * self.size), self.width // PROGRAMS))
        self.tiles = weight_tiles(weights, self.block)

    def launch(
        self,
        x: Tensor,
        out: Tensor,
        *,
        norm: Any | None = None,
        residual: Tensor | None = None,
        log: Tensor | None = None,
        counters: Tensor | None = None,
        num_tokens: int = 1,
    ) -> None:
        """out [B, width] = norm(x [B, D]) @ weights^T + residual."""
        large, small = cut(self.size)
        project_kernel[(self.tiles.shape[0],)](
            x,
            x if norm is None else norm.weight,
            self.tiles,
            self.weights[0],
            x if residual is None else residual,
            out,
            x if log is None else log,
            x if counters is None else counters,
            x.stride(0),
            out.stride(0),
            0.0 if norm is None else norm.eps,
            num_tokens,
            self.width,
            D=self.size,
            LARGE=large,
            SMALL=small,
            ROWS=self.num_rows,
            BLOCK=self.block,
            HAS_TILES=len(self.weights) > 1,
            HAS_NORM=norm is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_LOG=log is not None,
            num_warps=TILE_WARPS,
            **linked(self.is_linked),
        )


class FewRowsStep(DecodeStep):
    """Each row reads the experts that it chose; the shared ones come with them.

    Attributes:
        most_rows: Beyond, `ManyRowsStep` is faster.
        part: [B, D] float32, what branches write: the residual, if there is one, and their output.
        residual: What they add that to.
    """

    most_rows = 3

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.part: Tensor = self.hidden
        self.residual: Tensor | None = self.hidden
        self.dense_inner = self._empty(self.num_rows, self.config.intermediate_size)
        # of a layer with experts its router, else the second half of its MLP
        self.feed_forward = [
            self._projection(
                layer.block_sparse_moe.gate.weight if layer.is_moe else layer.mlp.down_proj.weight
            )
            for layer in self.layers
        ]

    def _prepare_experts(self) -> None:
        super()._prepare_experts()
        slots, width = self.top + self.num_shared, self.config.moe_intermediate_size
        self.activations = self._empty(self.num_rows, slots, width)

    def _projection(self, *weights: Tensor) -> VectorProjection:
        return VectorProjection(weights, self.num_rows, self.is_linked)

    def _project(self, projection: Any, norm: Any, out: Tensor, log: Tensor | None = None) -> None:
        counters = None if log is None else self.counters
        projection.launch(
            self.hidden, out, norm=norm, log=log, counters=counters, num_tokens=self.num_tokens
        )

    def _add(self, projection: Any, x: Tensor) -> None:
        projection.launch(x, self.part, residual=self.residual)

    def _project_gates(self, i: int) -> None:
        return None

    def _absorb(self, a: Any, table: Tensor) -> None:
        self._launch_absorb(a, table, has_queries=True)

    def _mix(self, i: int, out: Tensor) -> None:
        block = min(MIX_BLOCK, self.layers[i].self_attn.value_dim)
        self._launch_mix(i, out, block, MIX_GROUP, MIX_WARPS, has_values=True)

    def _dense(self, i: int) -> None:
        mlp, norm = self.layers[i].mlp, self.layers[i].post_attention_layernorm
        out, width = self.dense_inner, self.config.intermediate_size
        # as one shared expert, without others
        self._gated(norm, mlp.gate_proj.weight, mlp, out, width, top=0, slots=1)
        self._add(self.feed_forward[i], out)

    def _score_experts(self, i: int) -> None:
        norm = self.layers[i].post_attention_layernorm
        self._project(self.feed_forward[i], norm, self.router_logits)

    def _run_experts(self, i: int) -> None:
        layer = self.layers[i]
        moe, norm = layer.block_sparse_moe, layer.post_attention_layernorm
        D, width = self.config.hidden_size, self.config.moe_intermediate_size
        slots = self.top + self.num_shared
        gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
        shared = moe.shared_experts if self.num_shared else None
        self._gated(norm, gate_up, shared, self.activations, width, self.top, slots)
        experts_out_kernel[(-(-D // OUT_BLOCK), self.num_rows)](
            self.activations,
            self.experts,
            self.weights,
            down,
            down if shared is None else shared.down_proj.weight,
            self.hidden,
            self.part,
            D=D,
            I=width,
            PLACES=power_of_two(width),
            SHARED_PLACES=power_of_two(max(1, self.num_shared * width)),
            TOP=self.top,
            SLOTS=slots,
            BLOCK=OUT_BLOCK,
            HAS_RESIDUAL=self.residual is not None,
            num_warps=OUT_WARPS,
            **linked(self.is_linked),
        )

    def _gated(
        self,
        norm: Any,
        gate_up: Tensor,
        shared: Any,
        out: Tensor,
        width: int,
        top: int,
        slots: int,
    ) -> None:
        """out [B, slots, width] = silu(gate) * up of norm(hidden), of chosen and shared experts."""
        D = self.config.hidden_size
        large, small = cut(D)
        block = power_below(IN_BYTES // (4 * D))
        experts_in_kernel[(-(-width // block), self.num_rows * slots)](
            self.hidden,
            norm.weight,
            self.experts if top else gate_up,
            gate_up,
            gate_up if shared is None else shared.gate_proj.weight,
            gate_up if shared is None else shared.up_proj.weight,
            out,
            norm.eps,
            D=D,
            LARGE=large,
            SMALL=small,
            I=width,
            TOP=top,
            SLOTS=slots,
            BLOCK=block,
            num_warps=IN_WARPS,
            **linked(self.is_linked),
        )
