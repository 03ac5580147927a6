"""The decode step: all layers of the model for one new token per row, by few and large kernels.

`DecodeStep` owns the buffers between its kernels and launches them in order. What changes from
token to token lies on the device: the ids, two counters, and a table that says where the cache's
tensors are. A recording of the launches therefore serves any cache of as many rows
(`decode_graph.py` makes one).

Up to `FEW_ROWS` rows each weight is read by our own matrix-vector kernels, with norms, activations
and residuals inside; beyond that by cuBLAS, and each expert once for all rows that chose it.

Shapes: B rows, D hidden size, H heads, K key size, V value size, N key size without the shared
part, L latent rank, P shared key part, E experts, I expert width, S slots of a row: its experts
and the shared ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from kimi_linear.decode.expert_kernels import (
    experts_in_kernel,
    experts_out_kernel,
    group_kernel,
    grouped_in_kernel,
    grouped_out_kernel,
    route_kernel,
)
from kimi_linear.decode.kernels import (
    LOG2_E,
    absorb_kernel,
    add_norm_kernel,
    attend_kernel,
    kda_kernel,
    kda_out_kernel,
    mix_kernel,
)
from kimi_linear.decode.projection import (
    FEW_ROWS,
    Projection,
    can_link,
    cut,
    linked,
)
from kimi_linear.ops.runtime import power_of_two
from torch import Tensor, nn

# shares of a row's latents, and tokens that a program loads at once
SPLITS = 264
ATTEND_TOKENS, ATTEND_WARPS, ATTEND_STAGES = 32, 4, 3
TABLE_COLUMNS = 6
# columns of a state that a program has, and its warps: for few rows, and for more
KDA_BLOCK, KDA_WARPS = 64, 8
MANY_KDA_BLOCK, MANY_KDA_WARPS = 32, 4
# bytes, or rows, of weights that a program reads, and its warps: the experts of few rows ...
IN_BYTES, IN_WARPS = 40 << 10, 4
OUT_BLOCK, OUT_WARPS = 4, 4
# ... and of more: rows and columns of a tile
GROUPED_IN_BLOCK, GROUPED_IN_STEP = 32, 128
GROUPED_OUT_BLOCK, GROUPED_OUT_STEP = 128, 64


class DecodeStep:
    """One token for each of B rows.

    Args:
        model: A `KimiLinearForCausalLM` that `decode_graph.model_obstacle` has nothing against.
        num_rows: B.
        has_padding: Whether attention has to look at `real_tokens`.

    Attributes:
        ids: [B, 1] int64, the tokens.
        table: [layers, 6] int64, where the cache's tensors lie, see `kda_kernel` and
            `attend_kernel`.
        counters: [2] int64, cached and logged tokens; a run adds one to each.
        real_tokens: [B, at least S] uint8, 0 at padding.
        logits: [B, vocab_size], the result.
    """

    def __init__(self, model: nn.Module, num_rows: int, has_padding: bool) -> None:
        config: Any = model.config
        backbone: Any = model.model
        self.config, self.num_rows, self.has_padding = config, num_rows, has_padding
        self.few = num_rows <= FEW_ROWS
        self.layers: list[Any] = list(backbone.layers)
        self.norm, self.embed = backbone.norm, backbone.embed_tokens
        weight = self.embed.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.is_linked = can_link(self.device)
        self.ids = torch.zeros(num_rows, 1, dtype=torch.int64, device=self.device)
        self.table = torch.zeros(
            len(self.layers), TABLE_COLUMNS, dtype=torch.int64, device=self.device
        )
        self.counters = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.real = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.reserve_mask(1)
        self.hidden = torch.empty(num_rows, config.hidden_size, device=self.device)
        lm_head: Any = model.lm_head
        self.head = self._projection(lm_head.weight)
        self.logits = self._empty(num_rows, self.head.width)
        self._prepare_attention()
        self._prepare_experts()

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def reserve_mask(self, num_tokens: int) -> None:
        """Make room for a mask of so many tokens."""
        shape = (self.num_rows, num_tokens)
        self.real_tokens = torch.ones(*shape, dtype=torch.uint8, device=self.device)
        place = [self.real_tokens.data_ptr(), self.real_tokens.stride(0)]
        self.real.copy_(torch.tensor(place))

    def _projection(self, *weights: Tensor, **kwargs: Any) -> Projection:
        return Projection(weights, self.num_rows, self.is_linked, **kwargs)

    def _prepare_attention(self) -> None:
        """The projections of all attention layers, and the buffers that they share."""
        config, B = self.config, self.num_rows
        self.inputs: list[Projection] = []
        self.outputs: list[Projection] = []
        self.gate_inputs: list[Projection | None] = []
        for layer in self.layers:
            a = layer.self_attn
            is_kda = hasattr(a, "b_proj")
            projs = (
                (a.q_proj, a.k_proj, a.v_proj, a.f_a_proj, a.g_a_proj, a.b_proj)
                if is_kda
                else (a.q_proj, a.kv_a_proj_with_mqa)
            )
            self.inputs.append(self._projection(*(proj.weight for proj in projs)))
            gates = None
            if is_kda and not self.few:  # else `kda_kernel` does them
                first = 3 * a.num_heads * a.head_dim
                gates = self._projection(
                    a.f_b_proj.weight,
                    a.g_b_proj.weight,
                    x_columns=[first, first + a.head_dim],
                )
            self.gate_inputs.append(gates)
            self.outputs.append(self._projection(a.o_proj.weight))
        H, L, P = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        self.projected = self._empty(B, max(proj.width for proj in self.inputs))
        linear = config.linear_attn_config
        inner = linear["num_heads"] * linear["head_dim"]
        self.gates = self._empty(B, 2 * inner)
        self.kda_out = self._empty(B, inner, dtype=torch.float32)
        self.mixed_heads = self._empty(B, max(proj.size for proj in self.outputs))
        self.query = self._empty(B, H, L + P)
        self.latents = self._empty(B, H, L)
        self.splits = max(1, SPLITS // B)
        wide = torch.float32
        self.shares = self._empty(B, self.splits, H, L, dtype=wide)
        self.share_weights = self._empty(B, self.splits, 2, H, dtype=wide)
        # for many rows: the normed input of a block, and what it adds to the residual stream
        self.normed = self._empty(B, config.hidden_size)
        self.delta = self._empty(B, 1, config.hidden_size)

    def _prepare_experts(self) -> None:
        """The feed-forward layers' projections, and the buffers that they share."""
        config, B, D = self.config, self.num_rows, self.config.hidden_size
        self.routers: list[Projection | None] = []
        self.shared: list[tuple[Projection | None, Projection] | None] = []
        for layer in self.layers:
            moe = layer.block_sparse_moe if layer.is_moe else None
            self.routers.append(None if moe is None else self._projection(moe.gate.weight))
            mlp = layer.mlp if moe is None else getattr(moe, "shared_experts", None)
            # of few rows the chosen experts' kernels take the shared ones along
            is_separate = mlp is not None and (moe is None or not self.few)
            self.shared.append(self._mlp(mlp) if is_separate else None)
        widths = [pair[1].size for pair in self.shared if pair is not None]
        self.mlp = self._empty(B * max(widths, default=0))
        if not any(layer.is_moe for layer in self.layers):
            return
        self.top, self.num_shared = config.num_experts_per_token, config.num_shared_experts or 0
        slots = self.top + self.num_shared
        wide = torch.float32
        self.router_logits = self._empty(B, config.num_experts, dtype=wide)
        self.experts = self._empty(B, self.top, dtype=torch.int32)
        self.weights = self._empty(B, self.top, dtype=wide)
        self.order = self._empty(B * self.top, dtype=torch.int32)
        self.active = self._empty(config.num_experts + 1, dtype=torch.int32)
        self.begin = self._empty(power_of_two(config.num_experts + 1), dtype=torch.int32)
        self.activations = self._empty(B, slots, config.moe_intermediate_size)
        self.parts = self._empty(B, self.top + bool(self.num_shared), D)

    def _mlp(self, mlp: Any) -> tuple[Projection | None, Projection]:
        """The two halves of a gated MLP; the first is done by `_gated` for few rows."""
        gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
        if self.few:
            return None, self._projection(down)
        return self._projection(gate, ups=[up]), self._projection(down)

    def run(self) -> None:
        """Launch the step. Nothing here waits for the device."""
        self.hidden.copy_(F.embedding(self.ids[:, 0], self.embed.weight))
        added: Tensor | None = None  # what is still to be added to the residual stream
        for i, layer in enumerate(self.layers):
            attend = self._kda if hasattr(layer.self_attn, "b_proj") else self._latent
            added = attend(i, layer, added)
            feed = self._experts if layer.is_moe else self._dense
            added = feed(i, layer, added)
        self._project(self.head, self.norm, added, self.logits)
        self.counters += 1

    def _project(
        self,
        projection: Projection,
        norm: Any,
        added: Tensor | None,
        out: Tensor,
        table: Tensor | None = None,
    ) -> None:
        """out = projection of norm(hidden + added); the table's log gets the normed input."""
        counters = None if table is None else self.counters
        if self.few:
            projection.launch_norm(self.hidden, out, norm=norm, table=table, counters=counters)
            return
        self._add_norm(norm, added, table)
        projection.launch(self.normed, out)

    def _add_norm(self, norm: Any, added: Tensor | None, table: Tensor | None = None) -> None:
        """hidden += added; normed = norm(hidden)."""
        D = self.config.hidden_size
        add_norm_kernel[(self.num_rows,)](
            self.hidden,
            self.hidden if added is None else added,
            norm.weight,
            self.normed,
            self.hidden if table is None else table,
            self.counters,
            norm.eps,
            D=D,
            PLACES=power_of_two(D),
            PARTS=0 if added is None else added.shape[1],
            HAS_LOG=table is not None,
            num_warps=8,
            **linked(self.is_linked),
        )

    def _add(self, projection: Projection, x: Tensor) -> Tensor | None:
        """hidden += projection of x, now or, for many rows, by whoever gets the returned part."""
        if self.few:
            projection.launch_norm(x, self.hidden, residual=self.hidden)
            return None
        projection.launch(x, self.delta[:, 0])
        return self.delta

    def _kda(self, i: int, layer: Any, added: Tensor | None) -> Tensor | None:
        a, table = layer.self_attn, self.table[i]
        proj = self.inputs[i]
        self._project(proj, layer.input_layernorm, added, self.projected[:, : proj.width], table)
        gates = self.gate_inputs[i]
        if gates is not None:
            gates.launch(self.projected, self.gates)
        H, K, width = a.num_heads, a.head_dim, a.q_conv1d.weight.shape[-1]
        block, warps = KDA_BLOCK, KDA_WARPS
        if not self.few:
            block, warps = MANY_KDA_BLOCK, MANY_KDA_WARPS
        block = min(block, K)
        sizes = {
            "x_stride": self.projected.stride(0),
            "H": H,
            "K": K,
            "WIDTH": width,
            "TAPS": power_of_two(width - 1),
            "HAS_GATES": gates is not None,
            "num_warps": warps if K >= 128 else 4,
            **linked(self.is_linked),
        }
        kda_kernel[(self.num_rows, H, K // block)](
            self.projected,
            self.gates,
            a.q_conv1d.weight,
            a.k_conv1d.weight,
            a.v_conv1d.weight,
            a.f_b_proj.weight,
            a.A_log,
            a.dt_bias,
            table,
            self.kda_out,
            BLOCK=block,
            **sizes,
        )
        out = self.mixed_heads[:, : H * K]
        kda_out_kernel[(self.num_rows, H)](
            self.projected,
            self.gates,
            a.g_b_proj.weight,
            a.o_norm.weight,
            table,
            self.kda_out,
            out,
            out_stride=out.stride(0),
            eps=a.o_norm.eps,
            **sizes,
        )
        return self._add(self.outputs[i], out)

    def _latent(self, i: int, layer: Any, added: Tensor | None) -> Tensor | None:
        a, table, proj, B = layer.self_attn, self.table[i], self.inputs[i], self.num_rows
        self._project(proj, layer.input_layernorm, added, self.projected[:, : proj.width])
        self._absorb(a, table)
        H, L = a.num_heads, a.latent_dim
        sizes = {"H": H, "L": L, "SPLITS": self.splits, **linked(self.is_linked)}
        attend_kernel[(B, self.splits)](
            self.query,
            table,
            self.counters,
            self.real,
            self.shares,
            self.share_weights,
            a.scaling * LOG2_E,
            P=a.shared_key_dim,
            HEADS=max(16, power_of_two(H)),
            BLOCK=ATTEND_TOKENS,
            HAS_PADDING=self.has_padding,
            num_warps=ATTEND_WARPS,
            num_stages=ATTEND_STAGES,
            **sizes,
        )
        out = self.mixed_heads[:, : H * a.value_dim]
        block = min(32, a.value_dim) if self.few else a.value_dim
        mix_kernel[(B, H, a.value_dim // block)](
            self.shares,
            self.share_weights,
            a.kv_b_proj.weight,
            out if self.few else self.latents,
            out.stride(0),
            N=a.key_dim,
            V=a.value_dim,
            PLACES=power_of_two(self.splits),
            GROUP=min(16, power_of_two(self.splits)),
            BLOCK=block,
            HAS_VALUES=self.few,
            **sizes,
        )
        if not self.few:
            values = a.kv_b_proj.weight.unflatten(0, (H, -1))[:, a.key_dim :]  # [H, V, L]
            torch.bmm(
                self.latents.transpose(0, 1),
                values.transpose(1, 2),
                out=out.unflatten(1, (H, -1)).transpose(0, 1),
            )
        return self._add(self.outputs[i], out)

    def _absorb(self, a: Any, table: Tensor) -> None:
        """The new latent into the cache, the queries into the latents' coordinates."""
        H, N, L, P = a.num_heads, a.key_dim, a.latent_dim, a.shared_key_dim
        kv_b = a.kv_b_proj.weight
        block = min(128, L)
        absorb_kernel[(self.num_rows, H + 1 if self.few else 1, L // block if self.few else 1)](
            self.projected,
            kv_b,
            a.kv_a_layernorm.weight,
            table,
            self.counters,
            self.query,
            self.projected.stride(0),
            a.kv_a_layernorm.eps,
            FIRST=0 if self.few else H,
            H=H,
            N=N,
            V=a.value_dim,
            L=L,
            P=P,
            BLOCK=block,
            **linked(self.is_linked),
        )
        if not self.few:
            query = self.projected[:, : H * (N + P)].unflatten(1, (H, -1))  # [B, H, N + P]
            keys = kv_b.unflatten(0, (H, -1))[:, :N]  # [H, N, L]
            target = self.query[..., :L].transpose(0, 1)
            torch.bmm(query[..., :N].transpose(0, 1), keys, out=target)
            self.query[..., L:].copy_(query[..., N:])

    def _dense(self, i: int, layer: Any, added: Tensor | None) -> Tensor | None:
        pair = self.shared[i]
        assert pair is not None
        first, down = pair
        norm, mlp, out = layer.post_attention_layernorm, layer.mlp, self._inner(down)
        if first is None:  # as one shared expert, without others
            self._gated(norm, mlp.gate_proj.weight, mlp, out, width=down.size, top=0, slots=1)
        else:
            self._project(first, norm, added, out)
        return self._add(down, out)

    def _inner(self, down: Projection) -> Tensor:
        """Where the first half of a gated MLP goes."""
        return self.mlp[: self.num_rows * down.size].view(self.num_rows, down.size)

    def _experts(self, i: int, layer: Any, added: Tensor | None) -> Tensor | None:
        moe, norm, router = layer.block_sparse_moe, layer.post_attention_layernorm, self.routers[i]
        assert router is not None
        if self.few:
            router.launch_norm(self.hidden, self.router_logits, norm=norm)
        else:
            self._add_norm(norm, added)
            self._wide_router(moe.gate.weight)
        config = self.config
        route_kernel[(self.num_rows,)](
            self.router_logits,
            moe.gate.e_score_correction_bias,
            self.experts,
            self.weights,
            config.routed_scaling_factor,
            E=config.num_experts,
            PLACES=power_of_two(config.num_experts),
            TOP=self.top,
            SLOTS=power_of_two(self.top),
            IS_SIGMOID=config.moe_router_activation_func == "sigmoid",
            RENORMALIZE=config.moe_renormalize and self.top > 1,
            num_warps=1,
            **linked(self.is_linked),
        )
        if self.few:
            self._few_experts(moe, norm)
            return None
        return self._many_experts(i, moe)

    def _wide_router(self, weight: Tensor) -> None:
        """Router logits in float32, as the layers make them."""
        if self.dtype == torch.float32:
            torch.mm(self.normed, weight.t(), out=self.router_logits)
        else:
            torch.ops.aten.mm.dtype_out(
                self.normed, weight.t(), torch.float32, out=self.router_logits
            )

    def _few_experts(self, moe: Any, norm: Any) -> None:
        """Each row reads the experts that it chose."""
        B, D, width = self.num_rows, self.config.hidden_size, self.config.moe_intermediate_size
        slots = self.top + self.num_shared
        gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
        shared = getattr(moe, "shared_experts", None)
        self._gated(norm, gate_up, shared, self.activations, width, self.top, slots)
        block = OUT_BLOCK
        experts_out_kernel[(-(-D // block), B)](
            self.activations,
            self.experts,
            self.weights,
            down,
            down if shared is None else shared.down_proj.weight,
            self.hidden,
            D=D,
            I=width,
            PLACES=power_of_two(width),
            SHARED_PLACES=power_of_two(max(1, self.num_shared * width)),
            TOP=self.top,
            SLOTS=slots,
            BLOCK=block,
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
        block = max(1, IN_BYTES // (4 * D))
        block = 1 << (block.bit_length() - 1)
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

    def _many_experts(self, i: int, moe: Any) -> Tensor:
        """Each expert is read once for all rows that chose it."""
        B, D, width = self.num_rows, self.config.hidden_size, self.config.moe_intermediate_size
        E, pairs = self.config.num_experts, B * self.top
        group_kernel[(1,)](
            self.experts,
            self.order,
            self.begin,
            self.active,
            pairs,
            E=E,
            BINS=self.begin.shape[0],
            PAIRS=power_of_two(pairs),
            num_warps=8,
            **linked(self.is_linked),
        )
        sizes: dict[str, Any] = {
            "D": D,
            "I": width,
            "TOP": self.top,
            "GROUP": 16,
            "num_warps": 4,
            "num_stages": 4,
            **linked(self.is_linked),
        }
        activations = self.activations.view(-1)[: pairs * width]
        most = min(E, pairs)  # experts that can be chosen
        grouped_in_kernel[(-(-width // GROUPED_IN_BLOCK), most)](
            self.normed,
            self.order,
            self.begin,
            self.active,
            moe.experts.gate_up_proj,
            activations,
            BLOCK=GROUPED_IN_BLOCK,
            STEP=GROUPED_IN_STEP,
            **sizes,
        )
        grouped_out_kernel[(-(-D // GROUPED_OUT_BLOCK), most)](
            activations,
            self.order,
            self.begin,
            self.active,
            self.weights,
            moe.experts.down_proj,
            self.parts,
            PARTS=self.parts.shape[1],
            BLOCK=GROUPED_OUT_BLOCK,
            STEP=GROUPED_OUT_STEP,
            **sizes,
        )
        pair = self.shared[i]
        if pair is not None:
            first, down = pair
            assert first is not None
            out = self._inner(down)
            first.launch(self.normed, out)
            down.launch(out, self.parts[:, -1])
        return self.parts


__all__ = ["TABLE_COLUMNS", "DecodeStep"]
