"""The decode step: all layers of the model for the new tokens of a few sequences, by few and large
kernels. Each token is a row; one token of each sequence is the usual case.

`DecodeStep` owns the buffers between its kernels and launches them in order. What changes from
step to step lies on the device: the ids, counters, and a table that says where the cache's tensors
are. A recording of the launches therefore serves any cache with this number of rows (`recording.py`
makes one).

How weights are read depends on the number of rows: `few_rows.py` has matrix-vector kernels,
`many_rows.py` cuBLAS and grouped experts. What both do alike is here.

Shapes: S sequences, T tokens of each, B = S * T rows, the tokens of a sequence in turn, D hidden
size, H heads, K key size, V value size, N key size without the shared part, L latent rank, P shared
key part, E experts, I expert width.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_linear.decode.addresses import TABLE_COLUMNS, Counters
from kimi_linear.decode.attention_kernels import absorb_kernel, attend_kernel, mix_kernel
from kimi_linear.decode.delta_rule import OneToken, SeveralTokens
from kimi_linear.decode.expert_kernels import route_kernel
from kimi_linear.ops.chip import has_large_memory
from kimi_linear.ops.runtime import power_of_two

LOG2_E = 1.4426950408889634
# programs of attention that an H200 runs at once, two on each of 132 multiprocessors; the most
# waves of them, and how full waves have to be
SPLITS, MOST_WAVES, FULL = 264, 3, 0.95
# tokens that a program of attention loads at once, and of the last ones; stages; and warps, with
# some 200 KB of shared memory and without, where a program has a multiprocessor for itself
ATTEND_TOKENS, ATTEND_PIECE, ATTEND_STAGES = 32, 16, 3
LARGE_ATTEND_WARPS, SMALL_ATTEND_WARPS = 4, 8


def can_link(device: torch.device) -> bool:
    """Whether kernels may start early: from compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def linked(is_linked: bool) -> dict[str, bool]:
    """Arguments of a kernel that may start before the one before it has ended."""
    return {"IS_LINKED": True, "launch_pdl": True} if is_linked else {"IS_LINKED": False}


def shares_of_rows(num_rows: int) -> int:
    """How many shares of a row's latents fill the chip: those of the fewest waves of SPLITS
    programs that are at least FULL full, or else of the fullest."""
    full: dict[int, float] = {}
    for waves in range(1, MOST_WAVES + 1):
        shares = max(1, waves * SPLITS // num_rows)
        full.setdefault(shares, shares * num_rows / (waves * SPLITS))
    return next((n for n, part in full.items() if part >= FULL), max(full, key=lambda n: full[n]))


def weight_tiles(weights: Any, block: int, x_columns: list[int] | None = None) -> Tensor:
    """Rows for the projection kernels, one for every `block` rows of the weights: address, rows,
    column of the output, column of the input."""
    tiles, column = [], 0
    for weight, x_column in zip(weights, x_columns or [0] * len(weights), strict=True):
        size = weight.shape[0]
        for start in range(0, size, block):
            count = min(block, size - start)
            tiles.append([weight[start].data_ptr(), count, column + start, x_column])
        column += size
    return torch.tensor(tiles, dtype=torch.int64, device=weights[0].device)


class DecodeStep(ABC):
    """New tokens of some sequences; a subclass says how weights are read.

    Args:
        model: A `KimiLinearForCausalLM` that `obstacles.model_obstacle` has nothing against.
        num_sequences: S, the rows of the cache.
        has_padding: Whether attention has to look at `real_tokens`.
        num_tokens: T.
        is_pending: Whether caches may hold pending updates of KDA states (`cache/pending.py`); of
            several tokens they always may.
        page_tokens: Tokens of a page of latents, if the cache is a pool of them (`cache/pool.py`).

    Attributes:
        ids: [S, T] int64, the tokens.
        table: [layers, TABLE_COLUMNS] int64, where the cache's tensors lie, see `addresses.py`.
        counters: [S, 4] int64, columns of `Counters`; a run adds T to cached and logged tokens.
        real_tokens: [S, at least as many tokens as are cached] uint8, 0 at padding.
        logits: [B, vocab_size], the result.
        hidden: [B, D] float32, the residual stream.
    """

    # columns of a KDA state that a program has, and its warps
    kda_block, kda_warps = 32, 4

    def __init__(
        self,
        model: nn.Module,
        num_sequences: int,
        has_padding: bool,
        num_tokens: int = 1,
        is_pending: bool = False,
        page_tokens: int = 0,
    ) -> None:
        config: Any = model.config
        backbone: Any = model.model
        self.num_sequences, self.num_tokens = num_sequences, num_tokens
        self.page_tokens = page_tokens
        num_rows = num_sequences * num_tokens
        self.config, self.num_rows, self.has_padding = config, num_rows, has_padding
        self.layers: list[Any] = list(backbone.layers)
        self.is_kda = [kind == "linear_attention" for kind in config.layer_types]
        self.norm, self.embed = backbone.norm, backbone.embed_tokens
        weight = self.embed.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.is_linked = can_link(self.device)
        self.ids = self._zeros(num_sequences, num_tokens)
        self.table = self._zeros(len(self.layers), TABLE_COLUMNS)
        self.counters = self._zeros(num_sequences, len(Counters._fields))
        self.counters[:, -1] = torch.arange(num_sequences)  # rows of a cache that is no pool
        self.mask_address = self._zeros(2)  # of `real_tokens`, and its row stride
        self.reserve_mask(1)
        self.hidden = self._empty(num_rows, config.hidden_size, dtype=torch.float32)
        lm_head: Any = model.lm_head
        self.head = self._input_projection(lm_head.weight)
        self.logits = self._empty(num_rows, lm_head.weight.shape[0])
        launches = num_sequences, self.kda_block, self.kda_warps, linked(self.is_linked)
        self.delta_rule = (
            SeveralTokens(*launches, num_tokens=num_tokens)
            if num_tokens > 1 or is_pending
            else OneToken(*launches)
        )
        self._prepare_attention()
        if any(layer.is_moe for layer in self.layers):
            self._prepare_experts()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device=self.device)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def reserve_mask(self, num_tokens: int) -> None:
        """Make room for a mask of `num_tokens` tokens."""
        shape = (self.num_sequences, num_tokens)
        self.real_tokens = torch.ones(*shape, dtype=torch.uint8, device=self.device)
        place = [self.real_tokens.data_ptr(), self.real_tokens.stride(0)]
        self.mask_address.copy_(torch.tensor(place))

    def _prepare_attention(self) -> None:
        """The projections of all attention layers, and the buffers that they share."""
        config, B = self.config, self.num_rows
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        for layer, is_kda in zip(self.layers, self.is_kda, strict=True):
            a = layer.self_attn
            projs = (
                (a.q_proj, a.k_proj, a.v_proj, a.f_a_proj, a.g_a_proj, a.b_proj)
                if is_kda
                else (a.q_proj, a.kv_a_proj_with_mqa)
            )
            self.inputs.append(self._input_projection(*(proj.weight for proj in projs)))
            self.outputs.append(self._output_projection(a.o_proj.weight))
        H, L, P = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        linear = config.linear_attn_config
        wide = torch.float32
        self.projected = self._empty(B, max(proj.width for proj in self.inputs))
        self.kda_out = self._empty(B, linear["num_heads"] * linear["head_dim"], dtype=wide)
        self.mixed_heads = self._empty(B, max(proj.size for proj in self.outputs))
        self.query = self._empty(B, H, L + P)
        self.splits = shares_of_rows(B)
        is_large = has_large_memory(self.device)
        self.attend_warps = LARGE_ATTEND_WARPS if is_large else SMALL_ATTEND_WARPS
        self.shares = self._empty(B, self.splits, H, L)
        self.share_weights = self._empty(B, self.splits, 2, H, dtype=wide)

    def _prepare_experts(self) -> None:
        """The buffers that all layers with experts share."""
        config, B = self.config, self.num_rows
        self.top, self.num_shared = config.num_experts_per_token, config.num_shared_experts or 0
        self.router_logits = self._empty(B, config.num_experts, dtype=torch.float32)
        self.experts = self._empty(B, self.top, dtype=torch.int32)
        self.weights = self._empty(B, self.top, dtype=torch.float32)

    # ---------------------------------------------------------------------- how weights are read
    @abstractmethod
    def _projection(self, *weights: Tensor) -> Any:
        """Weights [n, D] of one input, whose outputs come side by side, for `_project`, `_add`."""

    def _input_projection(self, *weights: Tensor) -> Any:
        """A `_projection` of a normed input, for `_project` alone."""
        return self._projection(*weights)

    def _output_projection(self, weight: Tensor) -> Any:
        """A `_projection` of an attention's output, for `_add`."""
        return self._projection(weight)

    @abstractmethod
    def _project(self, projection: Any, norm: Any, out: Tensor, log: Tensor | None = None) -> None:
        """out = projection of norm(hidden); the log of the table's row `log` gets norm(hidden)."""

    @abstractmethod
    def _add(self, projection: Any, x: Tensor) -> None:
        """hidden += projection of x, at once or with the next norm."""

    @abstractmethod
    def _project_gates(self, i: int) -> Tensor | None:
        """KDA's gates [B, 2, H * K]; None if the kernels are to project them."""

    @abstractmethod
    def _absorb(self, a: Any, table: Tensor) -> None:
        """The new latent into the cache, the queries into the latents' coordinates."""

    @abstractmethod
    def _mix(self, i: int, out: Tensor) -> None:
        """Join the shares of attention, and apply the heads' value matrices."""

    def _fixed_output(self, i: int) -> tuple[tuple[Tensor, ...], int]:
        """Where an attention's output goes in fixed point too, and its places; here nowhere."""
        return (self.hidden,) * 4, 0

    @abstractmethod
    def _dense(self, i: int) -> None:
        """hidden += the MLP of a layer without experts."""

    @abstractmethod
    def _score_experts(self, i: int) -> None:
        """Router logits in float32, as the layers make them."""

    @abstractmethod
    def _run_experts(self, i: int) -> None:
        """hidden += the chosen and the shared experts."""

    # ------------------------------------------------------------------------------- the launches
    def run(self) -> None:
        """Launch the step. Nothing here waits for the device."""
        self._embed()
        for i, layer in enumerate(self.layers):
            if self.is_kda[i]:
                self._kda(i)
            else:
                self._latent(i)
            self._end_branch()
            if layer.is_moe:
                self._experts(i)
            else:
                self._dense(i)
            self._end_branch()
        self._make_logits()
        self.counters[:, :2] += self.num_tokens

    def _embed(self) -> None:
        """hidden = embeddings of the ids."""
        self.hidden.copy_(F.embedding(self.ids.flatten(), self.embed.weight))

    def _end_branch(self) -> None:  # noqa: B027  # one process has nothing to do
        """What several processes do between two branches, see `divided.py`."""

    def _make_logits(self) -> None:
        self._project(self.head, self.norm, self.logits)

    def _kda(self, i: int) -> None:
        layer, table, proj = self.layers[i], self.table[i], self.inputs[i]
        a = layer.self_attn
        self._project(proj, layer.input_layernorm, self.projected[:, : proj.width], table)
        gates = self._project_gates(i)
        out = self.mixed_heads[:, : a.num_heads * a.head_dim]
        self.delta_rule.launch(
            a,
            table,
            self.counters,
            self.projected,
            gates,
            self.kda_out,
            out,
            self._fixed_output(i),
        )
        self._add(self.outputs[i], out)

    def _latent(self, i: int) -> None:
        layer, table, proj = self.layers[i], self.table[i], self.inputs[i]
        a = layer.self_attn
        self._project(proj, layer.input_layernorm, self.projected[:, : proj.width])
        self._absorb(a, table)
        attend_kernel[(self.num_rows, self.splits)](
            self.query,
            table,
            self.counters,
            self.mask_address,
            self.shares,
            self.share_weights,
            a.scaling * LOG2_E,
            self.num_tokens,
            H=a.num_heads,
            L=a.latent_dim,
            SPLITS=self.splits,
            P=a.shared_key_dim,
            HEADS=max(16, power_of_two(a.num_heads)),
            BLOCK=ATTEND_TOKENS,
            PIECE=ATTEND_PIECE,
            PAGE=self.page_tokens,
            HAS_PADDING=self.has_padding,
            num_warps=self.attend_warps,
            num_stages=ATTEND_STAGES,
            **linked(self.is_linked),
        )
        out = self.mixed_heads[:, : a.num_heads * a.value_dim]
        self._mix(i, out)
        self._add(self.outputs[i], out)

    def _launch_absorb(self, a: Any, table: Tensor, has_queries: bool) -> None:
        """`absorb_kernel` for the latent and, in programs of their own, for the queries."""
        H, L = a.num_heads, a.latent_dim
        block = min(128, L)
        absorb_kernel[
            (self.num_rows, H + 1 if has_queries else 1, L // block if has_queries else 1)
        ](
            self.projected,
            a.kv_b_proj.weight,
            a.kv_a_layernorm.weight,
            table,
            self.counters,
            self.query,
            self.projected.stride(0),
            self.num_tokens,
            a.kv_a_layernorm.eps,
            FIRST=0 if has_queries else H,
            H=H,
            N=a.key_dim,
            V=a.value_dim,
            L=L,
            P=a.shared_key_dim,
            BLOCK=block,
            PAGE=self.page_tokens,
            **linked(self.is_linked),
        )

    def _launch_mix(
        self, i: int, out: Tensor, block: int, group: int, num_warps: int, has_values: bool
    ) -> None:
        """`mix_kernel`, a block of a head's values by program; without values, all its latents."""
        a = self.layers[i].self_attn
        fixed, places = self._fixed_output(i)
        mix_kernel[(self.num_rows, a.num_heads, a.value_dim // block)](
            self.shares,
            self.share_weights,
            a.kv_b_proj.weight,
            out,
            *fixed,
            out.stride(0),
            FIXED=places,
            H=a.num_heads,
            L=a.latent_dim,
            SPLITS=self.splits,
            N=a.key_dim,
            V=a.value_dim,
            PLACES=power_of_two(self.splits),
            GROUP=min(group, power_of_two(self.splits)),
            BLOCK=block,
            HAS_VALUES=has_values,
            num_warps=num_warps,
            **linked(self.is_linked),
        )

    def _experts(self, i: int) -> None:
        self._score_experts(i)
        config = self.config
        route_kernel[(self.num_rows,)](
            self.router_logits,
            self.layers[i].block_sparse_moe.gate.e_score_correction_bias,
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
        self._run_experts(i)
