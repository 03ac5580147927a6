"""The decode step of more rows: cuBLAS takes the dense products, or one launch takes several of
them, and each expert is read once for all rows that chose it.

Shapes: B rows, D hidden size, H heads, K key size, V value size, N key size without the shared
part, L latent rank, P shared key part, n output size of one weight, E experts, I expert width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.decode.expert_kernels import group_kernel, grouped_in_kernel, grouped_out_kernel
from kimi_linear.decode.few_rows import VectorProjection
from kimi_linear.decode.projection_kernels import add_norm_kernel, project_many_kernel
from kimi_linear.decode.step import DecodeStep, linked, weight_tiles
from kimi_linear.ops.chip import has_large_memory
from kimi_linear.ops.runtime import ceil_div, power_of_two

# rows up to which several weights are applied in one launch; beyond, cuBLAS takes one by one
SOME_ROWS = 64
# rows up to which KDA's own kernels project its gates; beyond, they are a launch of their own
OWN_GATES_ROWS = 4
# rows up to which a router is read row by row, and up to which one launch takes it, which unlike
# cuBLAS's is linked; outputs of a program of that
ROUTER_VECTOR_ROWS, ROUTER_ROWS, ROUTER_BLOCK = 8, 64, 16
# outputs and inputs of a tile of experts' weights, of both products: with the shared memory of
# Hopper, and with that of others
LARGE_TILES, SMALL_TILES = ((64, 128), (128, 128)), ((32, 128), (128, 64))
# of the norm between two branches
NORM_WARPS = 32
# shares that a program of joined attention loads at once, and its warps
MIX_GROUP, MIX_WARPS = 16, 4


class MatrixProjection:
    """Weights [n, D] of the same input, read once for all rows; their outputs come side by side.

    Args:
        weights: Contiguous.
        num_rows: B.
        is_linked: See `linked`.
        x_columns: Where each weight's input begins in the rows of x; None: all at the first column.
        up: A weight of the same shape as a single one: out is silu(x @ weight^T) * (x @ up^T).
        block: Outputs of a program, where one launch applies all weights.
        is_by_weight: Whether cuBLAS does; None: where that is faster.
    """

    def __init__(
        self,
        weights: tuple[Tensor, ...],
        num_rows: int,
        is_linked: bool,
        x_columns: list[int] | None = None,
        up: Tensor | None = None,
        block: int = 32,
        is_by_weight: bool | None = None,
    ) -> None:
        self.weights, self.num_rows, self.is_linked, self.up = weights, num_rows, is_linked, up
        self.block = block
        self.x_columns = x_columns or [0] * len(weights)
        self.width = sum(weight.shape[0] for weight in weights)
        self.size = weights[0].shape[1]
        if is_by_weight is None:
            is_by_weight = num_rows > SOME_ROWS or (len(weights) == 1 and up is None)
        self.is_by_weight = is_by_weight
        if not self.is_by_weight:
            self.tiles = weight_tiles(weights, self.block, self.x_columns)
            self.up_tiles = self.tiles
            if up is not None:
                self.up_tiles = weight_tiles([up], self.block)[:, 0].contiguous()

    def launch(self, x: Tensor, out: Tensor) -> None:
        """out [B, width] = x [B, ..] @ weights^T, or gated with `up`."""
        if self.is_by_weight:
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
            IS_GATED=self.up is not None,
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
        if self.up is not None:
            torch.mul(F.silu(out), torch.mm(x, self.up.t()), out=out)


class ManyRowsStep(DecodeStep):
    """What a branch adds to the residual stream is added with the next norm.

    Attributes:
        normed: [B, D], the normed input of a branch.
        to_add: [B, parts, D], what the last branch adds; None if that is done.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        B, D = self.num_rows, self.config.hidden_size
        linear = self.config.linear_attn_config
        self.normed = self._empty(B, D)
        self.to_add: Tensor | None = None
        self.branch_out = self._empty(B, 1, D)
        self.latents = self._empty(B, self.config.num_attention_heads, self.config.kv_lora_rank)
        self.gates = self._empty(B, 2 * linear["num_heads"] * linear["head_dim"])
        self.gate_projections = [
            self._gate_projection(layer.self_attn) if is_kda and B > OWN_GATES_ROWS else None
            for layer, is_kda in zip(self.layers, self.is_kda, strict=True)
        ]
        self.routers = [
            self._router(layer.block_sparse_moe.gate.weight) if layer.is_moe else None
            for layer in self.layers
        ]
        self.mlps = [self._mlp_projections(layer) for layer in self.layers]
        widths = [mlp[1].size for mlp in self.mlps if mlp is not None]
        self.mlp_inner = self._empty(B * max(widths, default=0))

    def _gate_projection(self, a: Any) -> MatrixProjection:
        """KDA's decay and output gate from their inner products, which stand behind q, k and v."""
        first = 3 * a.num_heads * a.head_dim
        weights = a.f_b_proj.weight, a.g_b_proj.weight
        columns = [first, first + a.head_dim]
        return MatrixProjection(weights, self.num_rows, self.is_linked, x_columns=columns)

    def _router(self, weight: Tensor) -> Any:
        """What multiplies by a router's weight; None: cuBLAS, with sums in float32."""
        given = (weight,), self.num_rows, self.is_linked
        if self.num_rows <= ROUTER_VECTOR_ROWS:
            return VectorProjection(*given)
        if self.num_rows <= ROUTER_ROWS:
            return MatrixProjection(*given, block=ROUTER_BLOCK, is_by_weight=False)
        return None

    def _mlp_projections(self, layer: Any) -> tuple[MatrixProjection, MatrixProjection] | None:
        """Both halves of a layer's dense MLP, or of its shared experts."""
        if layer.is_moe and not self.num_shared:
            return None
        mlp = layer.block_sparse_moe.shared_experts if layer.is_moe else layer.mlp
        first = self._gated_projection(mlp.gate_proj.weight, mlp.up_proj.weight)
        return first, self._projection(mlp.down_proj.weight)

    def _gated_projection(self, gate: Tensor, up: Tensor) -> MatrixProjection:
        """The first half of a gated MLP."""
        return MatrixProjection((gate,), self.num_rows, self.is_linked, up=up)

    def _prepare_experts(self) -> None:
        super()._prepare_experts()
        E, pairs = self.config.num_experts, self.num_rows * self.top
        self.order = self._empty(pairs, dtype=torch.int32)
        self.active = self._empty(E + 1, dtype=torch.int32)
        self.begin = self._empty(power_of_two(E + 1), dtype=torch.int32)
        self.activations = self._empty(pairs, self.config.moe_intermediate_size)
        num_parts = self.top + bool(self.num_shared)
        self.expert_parts = self._empty(self.num_rows, num_parts, self.config.hidden_size)

    def _projection(self, *weights: Tensor) -> MatrixProjection:
        return MatrixProjection(weights, self.num_rows, self.is_linked)

    def _project(self, projection: Any, norm: Any, out: Tensor, log: Tensor | None = None) -> None:
        self._add_norm(norm, log)
        projection.launch(self.normed, out)

    def _add_norm(self, norm: Any, log: Tensor | None = None) -> None:
        """hidden += what the last branch adds; normed = norm(hidden)."""
        self._launch_norm(add_norm_kernel, (), norm, log)

    def _launch_norm(
        self, kernel: Any, others: tuple[Tensor, ...], norm: Any, log: Tensor | None, **sizes: int
    ) -> None:
        D, parts = self.config.hidden_size, self.to_add
        self.to_add = None
        kernel[(self.num_rows,)](
            self.hidden,
            self.hidden if parts is None else parts,
            norm.weight,
            self.normed,
            *others,
            self.hidden if log is None else log,
            self.counters,
            norm.eps,
            self.num_tokens,
            D=D,
            PLACES=power_of_two(D),
            PARTS=0 if parts is None else parts.shape[1],
            HAS_LOG=log is not None,
            num_warps=NORM_WARPS,
            **sizes,
            **linked(self.is_linked),
        )

    def _add(self, projection: Any, x: Tensor) -> None:
        projection.launch(x, self.branch_out[:, 0])
        self.to_add = self.branch_out

    def _project_gates(self, i: int) -> Tensor | None:
        projection = self.gate_projections[i]
        if projection is None:
            return None
        projection.launch(self.projected, self.gates)
        return self.gates

    def _absorb(self, a: Any, table: Tensor) -> None:
        self._launch_absorb(a, table, has_queries=False)
        H, N, L, P = a.num_heads, a.key_dim, a.latent_dim, a.shared_key_dim
        query = self.projected[:, : H * (N + P)].unflatten(1, (H, -1))  # [B, H, N + P]
        keys = a.kv_b_proj.weight.unflatten(0, (H, -1))[:, :N]  # [H, N, L]
        target = self.query[..., :L].transpose(0, 1)
        torch.bmm(query[..., :N].transpose(0, 1), keys, out=target)
        self.query[..., L:].copy_(query[..., N:])

    def _mix(self, i: int, out: Tensor) -> None:
        a = self.layers[i].self_attn
        self._launch_mix(i, self.latents, a.value_dim, MIX_GROUP, MIX_WARPS, has_values=False)
        H = a.num_heads
        values = a.kv_b_proj.weight.unflatten(0, (H, -1))[:, a.key_dim :]  # [H, V, L]
        torch.bmm(
            self.latents.transpose(0, 1),
            values.transpose(1, 2),
            out=out.unflatten(1, (H, -1)).transpose(0, 1),
        )

    def _dense(self, i: int) -> None:
        mlp = self.mlps[i]
        assert mlp is not None
        first, down = mlp
        out = self._mlp_inner(down)
        self._project(first, self.layers[i].post_attention_layernorm, out)
        self._add(down, out)

    def _mlp_inner(self, down: MatrixProjection) -> Tensor:
        """Where the first half of a gated MLP goes."""
        return self.mlp_inner[: self.num_rows * down.size].view(self.num_rows, down.size)

    def _score_experts(self, i: int) -> None:
        layer = self.layers[i]
        self._add_norm(layer.post_attention_layernorm)
        router = self.routers[i]
        if router is None:
            self._wide_product(layer.block_sparse_moe.gate.weight, self.router_logits)
        else:
            router.launch(self.normed, self.router_logits)

    def _wide_product(self, weight: Tensor, out: Tensor) -> None:
        """out = normed @ weight^T in float32."""
        if self.dtype == torch.float32:
            torch.mm(self.normed, weight.t(), out=out)
        else:
            torch.ops.aten.mm.dtype_out(self.normed, weight.t(), torch.float32, out=out)

    def _run_experts(self, i: int) -> None:
        experts = self.layers[i].block_sparse_moe.experts
        D, width = self.config.hidden_size, self.config.moe_intermediate_size
        E, pairs = self.config.num_experts, self.num_rows * self.top
        self._group_pairs()
        sizes: dict[str, Any] = {
            "D": D,
            "I": width,
            "TOP": self.top,
            "GROUP": 16,
            "num_warps": 4,
            "num_stages": 4,
            **linked(self.is_linked),
        }
        most = min(E, pairs)  # experts that can be chosen
        tiles = LARGE_TILES if has_large_memory(self.device) else SMALL_TILES
        (in_block, in_step), (out_block, out_step) = tiles
        grouped_in_kernel[(ceil_div(width, in_block), most)](
            self.normed,
            self.order,
            self.begin,
            self.active,
            experts.gate_up_proj,
            self.activations,
            BLOCK=in_block,
            STEP=in_step,
            **sizes,
        )
        parts = self.expert_parts
        grouped_out_kernel[(ceil_div(D, out_block), most)](
            self.activations,
            self.order,
            self.begin,
            self.active,
            self.weights,
            experts.down_proj,
            parts,
            PARTS=parts.shape[1],
            BLOCK=out_block,
            STEP=out_step,
            **sizes,
        )
        self._run_shared(i, parts)

    def _group_pairs(self) -> None:
        """Sort the pairs of rows and experts by expert."""
        pairs = self.num_rows * self.top
        group_kernel[(1,)](
            self.experts,
            self.order,
            self.begin,
            self.active,
            pairs,
            E=self.config.num_experts,
            BINS=self.begin.shape[0],
            PAIRS=power_of_two(pairs),
            num_warps=8,
            **linked(self.is_linked),
        )

    def _run_shared(self, i: int, parts: Tensor) -> None:
        """The shared experts' part beside the others', all to be added with the next norm."""
        mlp = self.mlps[i]
        if mlp is not None:
            first, down = mlp
            out = self._mlp_inner(down)
            first.launch(self.normed, out)
            down.launch(out, parts[:, -1])
        self.to_add = parts
