"""Multi-head latent attention without positions (MLA), section 4 of arXiv 2510.26692.

Shapes: B batch, T tokens of this call, S tokens of cache and call, R real tokens of a packed call
(B = 1), D hidden size, H heads, K key size, V value size, L latent rank, P shared key part.
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from kimi_linear.cache.latents import LatentLayerCache
from kimi_linear.cache.rollback import KDAPlan
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.inputs.layout import SequenceLayout
from kimi_linear.layers.norm import KimiLinearRMSNorm
from kimi_linear.ops.latent_attention import (
    FUSED_QUERY_TOKENS,
    first_tokens,
    latent_attention,
    latent_attention_weights,
)
from kimi_linear.upstream.arguments import LAYER_ARGUMENTS, check_arguments
from kimi_linear.upstream.interfaces import ALL_ATTENTION_FUNCTIONS, attention_backend
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import Cache

LATENT_NORM_EPS = 1e-6
# Packed sequences of so many tokens on average are attended to one by one: a call for each.
SEQUENCE_TOKENS = 128


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
