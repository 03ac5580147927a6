"""Multi-head latent attention without positions (MLA), section 4 of arXiv 2510.26692.

Shapes: B batch, T tokens of this call, S tokens of cache and call, R real tokens of a packed call
(B = 1), D hidden size, H heads, K key size, V value size, L latent rank, P shared key part.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.layers.norm import KimiLinearRMSNorm
from kimi_linear.layers.plan import ForwardPlan
from kimi_linear.ops.latent_attention import latent_attention, latent_attention_weights
from kimi_linear.ops.latent_attention.blocks import first_tokens
from kimi_linear.ops.latent_attention.expanded import FUSED_QUERY_TOKENS
from kimi_linear.ops.latent_attention.sdpa import attention_by_sequence, eager_attention
from kimi_linear.ops.linear_map import is_linear_map, linear_map
from kimi_linear.ops.projections import project
from kimi_linear.upstream.arguments import LAYER_ARGUMENTS, check_arguments
from kimi_linear.upstream.interfaces import ALL_ATTENTION_FUNCTIONS, attention_backend, is_flash

LATENT_NORM_EPS = 1e-6


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
        self, hidden_states: Tensor, plan: ForwardPlan, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to [B, T, D] and, of some routes, the weights [B, H, T, S]."""
        check_arguments(self, kwargs, LAYER_ARGUMENTS)
        x = plan.in_line(hidden_states)  # [1, R, D] where sequences are read end to end
        latent = self.latent(x)  # [B, T, L + P]
        segments = plan.keep_latents(self.layer_idx, latent)
        match plan.route:
            case "latents":
                return self._attend_to_latents(x, segments, plan)
            case "texts":
                out, weights = self._attend_by_text(self.query(x), segments, plan.ends), None
            case "sequences":
                key, value = self.expand(plan.visible(latent))
                out, weights = self._attend_by_sequence(self.query(x), key, value, plan.ends), None
            case "flash":
                out, weights = self._attend_by_backend(x, latent, None, **plan.lengths, **kwargs)
            case "backend":
                out, weights = self._attend_by_backend(x, latent, plan.mask, **kwargs)
        out = project(out.flatten(-2), self.o_proj)
        return plan.in_rows(out, hidden_states.shape[0]), weights

    def query(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, H, K]."""
        query = (
            project(x, self.q_proj)
            if hasattr(self, "q_proj")
            else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        )
        return query.unflatten(-1, (-1, self.key_dim + self.shared_key_dim))

    def latent(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, L + P]: normed latent and shared key part, what the cache keeps."""
        latent, shared_key = project(x, self.kv_a_proj_with_mqa).split(
            [self.latent_dim, self.shared_key_dim], dim=-1
        )
        return torch.cat([self.kv_a_layernorm(latent), shared_key], dim=-1)

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, L + P] to keys [B, H, S, K] and values [B, H, S, V]."""
        latent, shared_key = latent.split([self.latent_dim, self.shared_key_dim], dim=-1)
        expanded = self.kv_b_proj(latent).unflatten(-1, (-1, self.key_dim + self.value_dim))
        key, value = expanded.transpose(1, 2).split([self.key_dim, self.value_dim], dim=-1)
        shared_key = shared_key.unsqueeze(1).expand(-1, key.shape[1], -1, -1)
        return torch.cat([key, shared_key], dim=-1), value

    @property
    def _dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    def _attend_by_backend(
        self, x: Tensor, latent: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention among this call's tokens by `attn_implementation`: [B, T, H, V], weights."""
        key, value = self.expand(latent)
        if is_flash(self.config) and self.value_dim != key.shape[-1]:  # it wants one head size
            value = F.pad(value, (0, key.shape[-1] - self.value_dim))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention_backend(self.config), eager_attention
        )
        out, weights = attention(
            self,
            self.query(x).transpose(1, 2),  # [B, H, T, K]
            key,
            value,
            mask,
            scaling=self.scaling,
            dropout=self._dropout,
            **kwargs,
        )
        return out[..., : self.value_dim], weights

    def _attend_by_sequence(
        self, query: Tensor, key: Tensor, value: Tensor, ends: list[int]
    ) -> Tensor:
        return attention_by_sequence(
            query, key, value, ends, scaling=self.scaling, dropout=self._dropout
        )

    def _attend_to_latents(
        self, x: Tensor, segments: list[Tensor], plan: ForwardPlan
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, T, D] and weights; a long call's queries are made a tile of tokens at a time,
        for memory's sake."""
        T, real = x.shape[1], plan.real_tokens
        size = max(1024, FUSED_QUERY_TOKENS // x.shape[0])
        if plan.seen is not None or size >= T or torch.is_grad_enabled():
            out, weights = self._attend(self.query(x), segments, real, plan.seen)
            return project(out.flatten(-2), self.o_proj), weights
        past, result = sum(segment.shape[1] for segment in segments) - T, torch.empty_like(x)
        for start in range(0, T, size):
            stop = min(start + size, T)
            own = None if real is None else real[:, : past + stop]
            before = first_tokens(segments, past + stop)
            out, _ = self._attend(self.query(x[:, start:stop]), before, own, None)
            result[:, start:stop] = project(out.flatten(-2), self.o_proj)
        return result, None

    def _attend_by_text(self, query: Tensor, texts: list[Any], ends: list[int]) -> Tensor:
        """[1, T, H, V]: each text's queries, which lie end to end, to the segments of its own."""
        parts = zip(texts, ends, ends[1:], strict=False)
        return torch.cat(
            [
                self._attend(query[:, start:stop], segments, None, None)[0]
                for segments, start, stop in parts
                if start < stop
            ],
            dim=1,
        )

    def _attend(
        self, query: Tensor, segments: list[Tensor], real: Tensor | None, seen: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Attention to latents [B, T, H, V]; weights [B, H, T, S] only if it is "eager"."""
        if not is_linear_map(self.kv_b_proj):
            return self._attend_by_module(query, segments, real, seen)
        weight, bias = linear_map(self.kv_b_proj, self.latent_dim, query)
        sizes = [self.key_dim, self.value_dim]
        key, value = weight.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1)
        inputs, options = (query, segments, key, value), {"scaling": self.scaling, "real_BS": real}
        weights = None
        if seen is not None or self._dropout or attention_backend(self.config) == "eager":
            out, weights = latent_attention_weights(
                *inputs, **options, seen_BTS=seen, dropout=self._dropout
            )
        else:
            out = latent_attention(*inputs, **options)
        if bias is not None:  # that of keys adds the same to all of a query's scores
            out = out + bias.unflatten(0, (-1, sum(sizes)))[:, self.key_dim :]
        return out, weights

    def _attend_by_module(
        self, query: Tensor, segments: list[Tensor], real: Tensor | None, seen: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`_attend` for a `kv_b_proj` that is no matrix (hooks, or a module in its place): calls it
        with all latents, cached ones too."""
        rows = query.shape[0]
        key, value = self.expand(torch.cat([x.expand(rows, -1, -1) for x in segments], dim=1))
        T, S = query.shape[1], key.shape[2]
        if seen is None:
            seen = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)
        else:  # padding that sees nothing sees all: its softmax would be NaN
            seen = seen[:, None]
            seen = seen | ~seen.any(dim=-1, keepdim=True)
        if real is not None:  # padding sees itself: nothing at all would be NaN
            seen = seen & (real[:, None, None] | seen.triu(S - T))
        mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill(~seen, -torch.inf)
        out, weights = eager_attention(
            self, query.transpose(1, 2), key, value, mask, self.scaling, self._dropout
        )
        return out, weights if attention_backend(self.config) == "eager" else None

    def split_size(self) -> tuple[str, int, int]:
        """What tensor parallelism divides: field, size, and what a part is a multiple of."""
        return "num_attention_heads", self.num_heads, 1
