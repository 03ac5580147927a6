"""The layers of Kimi Linear without its experts: norms, Kimi Delta Attention, latent attention,
gated MLP.

Source: arXiv 2510.26692, sections 3 and 4. Attribute names are the released checkpoints' names.

Shapes: B batch, T tokens of this call, S tokens of cache and call, R real tokens of a packed call
(B = 1), D hidden size, H heads, K key size, V value size, L latent rank, P shared key part,
W convolution width.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from kimi_linear.cache.hybrid import KDALayerCache, LatentLayerCache, States
from kimi_linear.cache.rollback import KDAPlan
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.inputs.layout import SequenceLayout
from kimi_linear.ops.experts.prefill_kernels import silu_mul
from kimi_linear.ops.gated_norm import gated_rms_norm
from kimi_linear.ops.joint_training import gated_mlp, project_kda, trains_jointly
from kimi_linear.ops.kda import CHUNK_SIZE, kda_attention
from kimi_linear.ops.latent_attention import (
    FUSED_QUERY_TOKENS,
    first_tokens,
    latent_attention,
    latent_attention_weights,
)
from kimi_linear.ops.runtime import has_kernels, is_exporting, is_plain_silu
from kimi_linear.ops.short_conv import convolution_state, short_convolution
from kimi_linear.ops.short_conv.kernels import convolve_three
from kimi_linear.upstream import (
    ALL_ATTENTION_FUNCTIONS,
    LAYER_ARGUMENTS,
    attention_backend,
    check_arguments,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

LATENT_NORM_EPS = 1e-6
# Tokens of all rows that a KDA layer reads at once where no graph is recorded: its intermediates
# take 130 KB a token at the 48B model's sizes, and longer pieces are not faster.
PIECE_TOKENS = 16384
# Likewise for the gated MLP.
MLP_PIECE_TOKENS = 32768
# Packed sequences of so many tokens on average are attended to one by one: a call for each.
SEQUENCE_TOKENS = 128


class KimiLinearRMSNorm(nn.Module):
    """RMS norm over the last dimension, computed in float32, scaled in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == self.weight.dtype:  # one kernel, wide too, keeps nothing wide
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        return self.weight * F.rms_norm(x.to(wide), self.weight.shape, eps=self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class KimiLinearGatedRMSNorm(KimiLinearRMSNorm):
    """RMS norm over the head, times a sigmoid gate, in float32."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, gate, self.weight, self.eps)


class KimiLinearShortConv(nn.Module):
    """Causal depthwise convolution over the last W tokens, followed by SiLU."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 1, width))

    def forward(
        self, x: Tensor, state: Tensor | None, output_state: bool, layout: SequenceLayout
    ) -> tuple[Tensor, Tensor | None]:
        out, after = short_convolution(
            x,
            self.weight,
            initial_state=state,
            output_final_state=output_state and layout.order is None,
            cu_seqlens=layout.cu_seqlens,
        )
        if output_state and layout.order is not None:
            after = layout.last_inputs(x, state, self.weight.shape[2] - 1)
        return out, after

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


class KimiLinearDeltaAttention(nn.Module):
    """Kimi Delta Attention: a delta rule whose state decays per key channel (equation 1)."""

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        linear = config.linear_attn_config
        self.layer_idx = layer_idx
        self.num_heads, self.head_dim = linear["num_heads"], linear["head_dim"]
        hidden, inner, width = (
            config.hidden_size,
            self.num_heads * self.head_dim,
            linear["short_conv_kernel_size"],
        )
        self.q_proj = nn.Linear(hidden, inner, bias=False)
        self.k_proj = nn.Linear(hidden, inner, bias=False)
        self.v_proj = nn.Linear(hidden, inner, bias=False)
        self.q_conv1d = KimiLinearShortConv(inner, width)
        self.k_conv1d = KimiLinearShortConv(inner, width)
        self.v_conv1d = KimiLinearShortConv(inner, width)
        self.A_log = nn.Parameter(torch.empty(1, 1, self.num_heads, 1, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.f_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.f_b_proj = nn.Linear(self.head_dim, inner, bias=False)
        self.b_proj = nn.Linear(hidden, self.num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden, self.head_dim, bias=False)
        self.g_b_proj = nn.Linear(self.head_dim, inner, bias=False)
        self.o_norm = KimiLinearGatedRMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        layout: SequenceLayout,
        cache: Cache | None = None,
        kda_plan: KDAPlan | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        check_arguments(self, kwargs, LAYER_ARGUMENTS)
        if cache is None or kda_plan is None:
            return self._read(hidden_states, layout)[0], None
        past: KDALayerCache = cache.layers[self.layer_idx]
        x, states = past.start(hidden_states, kda_plan)
        own = past.writable_state(hidden_states.shape[0])
        *_, last = runs = kda_plan.runs
        outputs = []
        if len(runs) == 2 and all(r.start < r.stop and r.layout.is_plain for r in runs):
            out, states, anchor = self._read(x, last.layout, states, own, last.start)
            past.keep_anchor(anchor)
            outputs.append(out)
            runs = ()
        for run in runs:
            if run.start < run.stop:
                part, state_out = x[:, run.start : run.stop], None if run.makes_anchor else own
                out, states, _ = self._read(part, run.layout, states, state_out)
                outputs.append(out)
            if run.makes_anchor:
                past.keep_anchor(states)
        past.update(states, hidden_states, kda_plan, x[:, last.start : last.stop])
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return out[:, -hidden_states.shape[1] :], None

    def _read(
        self,
        x: Tensor,  # [B, T, D]
        layout: SequenceLayout,
        states: States | None = None,
        state_out: Tensor | None = None,
        cut: int = 0,
    ) -> tuple[Tensor, States, States]:
        """`_run`, for memory's sake in pieces of tokens where plain rows are long and no graph is
        recorded."""
        B, T = x.shape[:2]
        size = max(CHUNK_SIZE, PIECE_TOKENS // B // CHUNK_SIZE * CHUNK_SIZE)
        is_whole = is_exporting() or torch.is_grad_enabled()
        if is_whole or not layout.is_plain or size >= T:
            return self._run(x, layout, states, state_out, cut)
        out, states = torch.empty_like(x), states or (None, None)
        at_cut: States = (None, None)
        for start in range(0, T, size):
            stop = min(start + size, T)
            inside = cut - start if start < cut <= stop else 0
            piece_out, states, found = self._run(
                x[:, start:stop], layout, states, state_out if stop == T else None, inside
            )
            out[:, start:stop] = piece_out
            at_cut = found if inside else at_cut
        return out, states, at_cut

    def _run(
        self,
        hidden_states: Tensor,  # [B, T, D]
        layout: SequenceLayout,
        states: States | None = None,
        state_out: Tensor | None = None,
        cut: int = 0,
    ) -> tuple[Tensor, States, States]:
        """Output [B, T, D], the states after the last token, from those before the first one, and
        if `cut` is not 0 the states after so many tokens: of plain rows only.

        No states are made if `states` is None, which is not the same as a pair of None: that stands
        for the states of nothing.
        """
        conv_state, recurrent_state = states or (None, None)
        x = layout.pack(hidden_states)  # [1, R, D], or [B, T, D] where rows are plain sequences
        inputs, gate, conv_states, is_joint = self._inputs(
            x, layout, conv_state, states is not None, cut
        )
        if layout.context is not None:
            recurrent_state = layout.context.entering_state(
                inputs, self.A_log, self.dt_bias, layout
            )
        out, state, state_at_cut = self._attend(
            inputs,
            cut,
            initial_state=layout.initial_states(recurrent_state),
            output_final_state=states is not None,
            cu_seqlens=layout.cu_seqlens,
            state_out=state_out,
            is_normalised=is_joint,
        )
        del inputs
        gate = self._heads(self.g_b_proj(self.g_a_proj(x) if gate is None else gate))
        out = self.o_proj(self.o_norm(out, gate).flatten(-2))
        out = layout.unpack(out, hidden_states.shape[0])
        return out, (conv_states[0], layout.row_states(state)), (conv_states[1], state_at_cut)

    def _inputs(
        self, x: Tensor, layout: SequenceLayout, state: Tensor | None, output_state: bool, cut: int
    ) -> tuple[tuple[Tensor, ...], Tensor | None, list[Tensor | None], bool]:
        """`kda_attention`'s q, k, v, g, beta [.., .., H, ...]; the output gate's inner product, if
        it is made already; the convolutions' states as `_project` returns them; whether q and k are
        normalised."""
        gate: Tensor | None = None
        conv_states: list[Tensor | None] = [None, None]
        if not output_state and layout.context is None:
            linears, taps = self._readers()
            is_joint = trains_jointly(x, linears, *taps)
        else:
            is_joint = False
        if is_joint:
            *flat, decay, gate, beta = project_kda(x, linears, taps, layout, self.head_dim)
            qkv = [self._heads(each) for each in flat]
        else:
            if layout.context is not None:
                state = self._entering_inputs(x, layout)
            qkv, conv_states = self._project(x, layout, state, output_state, cut)
            decay, beta = self.f_a_proj(x), self.b_proj(x)
        gates = layout.silenced(self._heads(self.f_b_proj(decay)), beta)
        return (*qkv, *gates), gate, conv_states, is_joint

    def _attend(
        self, inputs: tuple[Tensor, ...], cut: int, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`kda_attention` and its state after the first `cut` tokens too, if there is a cut."""
        attend = functools.partial(kda_attention, A_log=self.A_log, dt_bias=self.dt_bias, **kwargs)
        if cut in (0, inputs[0].shape[1]):
            out, state = attend(*inputs)
            return out, state, state if cut else None
        before, at_cut = attend(*(x[:, :cut] for x in inputs), state_out=None)
        after, state = attend(*(x[:, cut:] for x in inputs), initial_state=at_cut)
        return torch.cat([before, after], dim=1), state, at_cut

    def _project(
        self, x: Tensor, layout: SequenceLayout, state: Tensor | None, output_state: bool, cut: int
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """q, k, v [.., .., H, K] after convolution and SiLU; its states [B, 3, H * K, W - 1] after
        all tokens and after `cut` tokens."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        inputs, weights = [proj(x) for proj in projections], [c.weight for c in convolutions]
        is_in_rows = layout.cu_seqlens is None and layout.order is None
        if is_in_rows and has_kernels(*inputs, *weights):
            outputs, after, at_cut = convolve_three(inputs, weights, state, cut)
            return [self._heads(out) for out in outputs], [after if output_state else None, at_cut]
        states = layout.initial_states(state)
        outputs, tails, tails_at_cut = [], [], []
        for i, (y, conv) in enumerate(zip(inputs, convolutions, strict=True)):
            initial = None if states is None else states[:, i]
            out, tail = conv(y, initial, output_state, layout)
            outputs.append(self._heads(out))
            tails.append(tail)
            if cut:
                width = conv.weight.shape[2]
                tails_at_cut.append(convolution_state(y[:, :cut], initial, width - 1))
        conv_state = layout.row_states(torch.stack(tails, dim=1)) if output_state else None
        return outputs, [conv_state, torch.stack(tails_at_cut, dim=1) if cut else None]

    def _readers(self) -> tuple[tuple[nn.Linear, ...], tuple[Tensor, ...]]:
        """What multiplies the layer's input, q, k and v first, and the taps of these three."""
        q, k, v = self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight
        linears = self.q_proj, self.k_proj, self.v_proj, self.f_a_proj, self.g_a_proj, self.b_proj
        return linears, (q, k, v)

    def _entering_inputs(self, x: Tensor, layout: SequenceLayout) -> Tensor:
        """[1, 3, H * K, W - 1]: the convolutions' inputs before those of this process' tokens."""
        count = self.q_conv1d.weight.shape[2] - 1
        before = layout.context.previous_tokens(x, count)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return torch.stack([proj(before).transpose(1, 2) for proj in projections], dim=1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # in tensor parallelism, some of the heads

    def split_size(self) -> tuple[str, int, int]:
        """What tensor parallelism divides: field, size, and what a part is a multiple of."""
        return "linear_attn_config['num_heads']", self.num_heads, 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Casting the model to 16 bits moves the decay parameters but leaves them in float32."""

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor not in decay or moved.dtype not in (torch.float16, torch.bfloat16):
                return moved
            return tensor.to(moved.device, torch.float32)

        decay = _IdentitySet(self.A_log, self.dt_bias, self.A_log.grad, self.dt_bias.grad)
        return super()._apply(keep_wide, recurse)


class _IdentitySet:
    """Membership by identity: `in` on a list of tensors would compare values."""

    def __init__(self, *items: Any) -> None:
        self._ids = {id(item) for item in items if item is not None}

    def __contains__(self, item: Any) -> bool:
        return id(item) in self._ids


def eager_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, T, K]
    key: Tensor,  # [B, H, S, K]
    value: Tensor,  # [B, H, S, V]
    attention_mask: Tensor | None,  # [B, 1, T, S], added to the scores
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by plain matrix products: [B, T, H, V] and the weights [B, H, T, S]."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
        query.dtype
    )
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class KimiLinearLatentAttention(nn.Module):
    """Multi-head latent attention without positions: one latent per token serves all heads."""

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.key_dim, self.shared_key_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent_dim, self.value_dim = config.kv_lora_rank, config.v_head_dim
        self.scaling = config.qk_head_dim**-0.5
        hidden, query = config.hidden_size, self.num_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = KimiLinearRMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden, self.latent_dim + self.shared_key_dim, bias=False
        )
        self.kv_a_layernorm = KimiLinearRMSNorm(self.latent_dim, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(
            self.latent_dim, self.num_heads * (self.key_dim + self.value_dim), bias=False
        )
        self.o_proj = nn.Linear(self.num_heads * self.value_dim, hidden, bias=False)

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, D]
        layout: SequenceLayout,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        real_tokens: Tensor | None = None,
        by_blocks: bool = False,
        kda_plan: KDAPlan | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`attention_mask` is the backend's; `real_tokens` [B, S] is False at padding; `by_blocks`
        says that the latents are attended to by our own code instead of the backend, in a compiled
        step by an `attention_mask` [B, T, S]."""
        check_arguments(self, kwargs, LAYER_ARGUMENTS)
        batch_size = hidden_states.shape[0]
        use_flash = is_flash_attention(self.config)
        # flash attention takes sequences end to end, and "sdpa" one by one; else rows and a mask
        alone = attends_by_sequence(self.config, layout)
        packed = use_flash and layout.cu_seqlens is not None and cache is None
        packed = (packed and not by_blocks) or alone
        x = layout.pack(hidden_states) if packed else hidden_states
        latent = self._latent(x)  # [B, T, L + P]
        segments = [latent]
        if cache is not None:
            own: LatentLayerCache = cache.layers[self.layer_idx]
            segments = own.update(latent)
        if layout.context is not None:
            keys = layout.context.latents(latent)
            ends = [0, x.shape[1]] if layout.cu_seqlens is None else layout.ends
            out = self._attend_by_sequence(self._query(x), keys, ends)
            return self.o_proj(out.flatten(-2)), None
        if by_blocks:
            return self._attend_in_tiles(x, segments, real_tokens, attention_mask)
        if alone:
            out, weights = self._attend_by_sequence(self._query(x), latent, layout.ends), None
        else:
            mask = None if packed else attention_mask
            lengths = _flash_lengths(layout) if packed else {}
            out, weights = self._backend(self._query(x), latent, mask, **lengths, **kwargs)
        out = self.o_proj(out.flatten(-2))
        return (layout.unpack(out, batch_size) if packed else out), weights

    def _attend_in_tiles(
        self,
        x: Tensor,
        segments: list[Tensor],
        real_tokens: Tensor | None,
        seen: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, T, D] and weights; a long call's queries are made a tile of tokens at a time,
        for memory's sake."""
        T = x.shape[1]
        size = max(1024, FUSED_QUERY_TOKENS // x.shape[0])
        if seen is not None or size >= T or torch.is_grad_enabled():
            out, weights = self._attend(self._query(x), segments, real_tokens, seen)
            return self.o_proj(out.flatten(-2)), weights
        past, result = sum(segment.shape[1] for segment in segments) - T, torch.empty_like(x)
        for start in range(0, T, size):
            stop = min(start + size, T)
            before, real = first_tokens(segments, past + stop), real_tokens
            real = None if real is None else real[:, : past + stop]
            out, weights = self._attend(self._query(x[:, start:stop]), before, real)
            result[:, start:stop] = self.o_proj(out.flatten(-2))
        return result, None

    def _attend(
        self,
        query: Tensor,
        segments: list[Tensor],
        real_tokens: Tensor | None,
        seen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to cached latents [B, T, H, V]; weights [B, H, T, S] only if it is "eager".
        With `seen` [B, T, S] that, instead of the order of tokens, says what each one sees."""
        if not _is_linear_map(self.kv_b_proj):
            return self._attend_expanded(query, segments, real_tokens, seen)
        weight, bias = self._kv_b_weight(query)
        sizes = [self.key_dim, self.value_dim]
        key, value = weight.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
        dropout = self.config.attention_dropout if self.training else 0.0
        weights = None
        if seen is not None or dropout or attention_backend(self.config) == "eager":
            out, weights = latent_attention_weights(
                query,
                segments,
                key,
                value,
                scaling=self.scaling,
                real_BS=real_tokens,
                seen_BTS=seen,
                dropout=dropout,
            )
        else:
            out = latent_attention(
                query, segments, key, value, scaling=self.scaling, real_BS=real_tokens
            )
        if bias is not None:  # that of keys adds the same to all of a query's scores
            out = out + bias.unflatten(0, (-1, sum(sizes)))[:, self.key_dim :]
        return out, weights

    def _backend(
        self, query: Tensor, latent: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention among this call's tokens by the configured backend: [B, T, H, V], weights."""
        key, value = self._expand(latent)
        if is_flash_attention(self.config) and self.value_dim != key.shape[-1]:
            value = F.pad(value, (0, key.shape[-1] - self.value_dim))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention_backend(self.config), eager_attention
        )
        out, weights = attention(
            self,
            query.transpose(1, 2),  # [B, H, T, K]
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        return out[..., : self.value_dim], weights

    def _attend_by_sequence(self, query: Tensor, latent: Tensor, ends: list[int]) -> Tensor:
        """Attention within each of the sequences that stand end to end: [1, R, H, V]. There may be
        latents before those of the queries, of the first sequence."""
        query, (key, value) = query.transpose(1, 2), self._expand(latent)
        if self.value_dim < key.shape[-1]:  # flash attention wants one head size
            value = F.pad(value, (0, key.shape[-1] - self.value_dim))
        kernels: AbstractContextManager[Any] = nullcontext()
        if query.is_cuda:  # all but cuDNN, which would make a plan for each length
            kernels = sdpa_kernel(
                [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            )
        dropout = self.config.attention_dropout if self.training else 0.0
        sizes = [stop - start for start, stop in pairwise(ends)]
        lengths = [sizes[0] + key.shape[2] - query.shape[2], *sizes[1:]]
        parts = zip(
            query.split(sizes, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
        )
        with kernels:
            outputs = [
                F.scaled_dot_product_attention(
                    q, k, v, **_causal(q, k), dropout_p=dropout, scale=self.scaling
                )
                for q, k, v in parts
                if q.shape[2]
            ]
        return torch.cat(outputs, dim=2).transpose(1, 2)[..., : self.value_dim]

    def _attend_expanded(
        self,
        query: Tensor,
        segments: list[Tensor],
        real_tokens: Tensor | None,
        seen: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `_attend`, by calling `kv_b_proj` with all latents: what its hooks do, or a module in
        its place, acts on cached tokens as it does in a call without a past."""
        rows = query.shape[0]
        key, value = self._expand(torch.cat([x.expand(rows, -1, -1) for x in segments], dim=1))
        T, S = query.shape[1], key.shape[2]
        if seen is None:
            seen = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
        else:  # padding that sees nothing sees all: its softmax would be NaN
            seen = seen[:, None]
            seen = seen | ~seen.any(dim=-1, keepdim=True)
        if real_tokens is not None:  # padding sees itself: nothing at all would be NaN
            seen = seen & (real_tokens[:, None, None] | seen.triu(S - T))
        mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf)
        out, weights = eager_attention(
            self,
            query.transpose(1, 2),
            key,
            value,
            mask,
            self.scaling,
            self.config.attention_dropout if self.training else 0.0,
        )
        return out, weights if attention_backend(self.config) == "eager" else None

    def _kv_b_weight(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """[H * (K - P + V), L] and the bias, also where adapters or quantised weights take
        kv_b_proj's place, or its weight is elsewhere between calls. The layer itself has no bias;
        those of adapters may."""
        proj = self.kv_b_proj
        if (
            type(proj) is nn.Linear
            and getattr(proj, "bias", None) is None
            and type(proj.weight) in (nn.Parameter, Tensor)
            and "forward" not in vars(proj)
        ):
            return proj.weight, None
        eye = torch.eye(self.latent_dim, dtype=like.dtype, device=like.device)
        weight = proj(eye).transpose(0, 1)
        if not any(name.rpartition(".")[2] == "bias" for name, _ in proj.named_parameters()):
            return weight, None
        bias = proj(torch.zeros_like(eye[:1]))[0]
        return weight - bias[:, None], bias

    def _query(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, H, K]."""
        query = (
            self.q_proj(x)
            if hasattr(self, "q_proj")
            else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        )
        return query.unflatten(-1, (-1, self.key_dim + self.shared_key_dim))

    def _latent(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, L + P]: normed latent and shared key part, what the cache keeps."""
        latent, shared_key = self.kv_a_proj_with_mqa(x).split(
            [self.latent_dim, self.shared_key_dim], dim=-1
        )
        return torch.cat([self.kv_a_layernorm(latent), shared_key], dim=-1)

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, L + P] to keys [B, H, S, K] and values [B, H, S, V]."""
        latent, shared_key = latent.split([self.latent_dim, self.shared_key_dim], dim=-1)
        expanded = self.kv_b_proj(latent).unflatten(-1, (-1, self.key_dim + self.value_dim))
        key, value = expanded.transpose(1, 2).split([self.key_dim, self.value_dim], dim=-1)
        shared_key = shared_key.unsqueeze(1).expand(-1, key.shape[1], -1, -1)
        return torch.cat([key, shared_key], dim=-1), value

    def split_size(self) -> tuple[str, int, int]:
        """What tensor parallelism divides: field, size, and what a part is a multiple of."""
        return "num_attention_heads", self.num_heads, 1


def _is_linear_map(proj: nn.Module) -> bool:
    """Whether a module in a linear layer's place is one: the layer itself, quantised, offloaded by
    accelerate or with PEFT's adapters, and without hooks that could change what it gives."""
    if any(each._forward_hooks or each._forward_pre_hooks for each in proj.modules()):
        return False
    if "forward" in vars(proj) and not hasattr(proj, "_hf_hook"):
        return False
    return isinstance(proj, nn.Linear) or hasattr(proj, "base_layer")


def _causal(query: Tensor, key: Tensor) -> dict[str, Any]:
    """That queries [.., T, K] attend to the keys [.., S, K] up to their own, the last T."""
    T, S = query.shape[2], key.shape[2]
    return {"is_causal": True} if T == S else {"attn_mask": causal_lower_right(T, S)}


def attends_by_sequence(config: KimiLinearConfig, layout: SequenceLayout) -> bool:
    """Whether packed sequences are attended to one by one instead of in rows, whose mask grows with
    the square of their length: by "sdpa", where the sequences are not too short for that."""
    if not layout.is_packed or attention_backend(config) != "sdpa":
        return False
    assert layout.cu_seqlens is not None
    count = layout.cu_seqlens.numel() - 1
    is_long = layout.num_places >= count * SEQUENCE_TOKENS
    return is_long and not torch.compiler.is_compiling()


def is_flash_attention(config: KimiLinearConfig) -> bool:
    return "flash" in attention_backend(config)


def _flash_lengths(layout: SequenceLayout) -> dict[str, Any]:
    """What Transformers' flash attention takes for sequences that stand end to end."""
    assert layout.cu_seqlens is not None
    longest = int(layout.cu_seqlens.diff().max())
    return {
        "cu_seq_lens_q": layout.cu_seqlens,
        "cu_seq_lens_k": layout.cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


class KimiLinearMLP(nn.Module):
    """Gated MLP."""

    def __init__(self, config: KimiLinearConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        is_whole = is_exporting() or torch.is_grad_enabled()
        if is_whole or tokens.shape[0] <= MLP_PIECE_TOKENS:
            return self._run(x)
        out = torch.empty_like(tokens)
        for start in range(0, tokens.shape[0], MLP_PIECE_TOKENS):
            piece = slice(start, start + MLP_PIECE_TOKENS)
            out[piece] = self._run(tokens[piece])
        return out.view_as(x)

    def _run(self, x: Tensor) -> Tensor:
        linears = self.gate_proj, self.up_proj, self.down_proj
        if trains_jointly(x, linears) and is_plain_silu(self.act_fn):
            return gated_mlp(x, *linears)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if has_kernels(gate, up) and is_plain_silu(self.act_fn):
            inner = silu_mul(gate.flatten(0, -2), up.flatten(0, -2)).view_as(up)
        else:
            inner = self.act_fn(gate) * up
        return self.down_proj(inner)

    def split_size(self) -> tuple[str, int, int]:
        """What tensor parallelism divides: field, size, and what a part is a multiple of."""
        return "intermediate_size", self.down_proj.in_features, 1


__all__ = [
    "KimiLinearDeltaAttention",
    "KimiLinearLatentAttention",
    "KimiLinearMLP",
    "KimiLinearRMSNorm",
    "KimiLinearShortConv",
    "attends_by_sequence",
    "is_flash_attention",
]
