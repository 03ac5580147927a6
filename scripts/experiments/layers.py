"""The models that experiments compare: this package's layers, and Gated DeltaNet and Mamba2 in
their place, in the same blocks with the same embedding, norms, MLPs and head.

    kda     Kimi Delta Attention, this package's layer.
    gdn     Gated DeltaNet (arXiv 2412.06464): KDA's layer with one decay per head instead of one
            per channel: KDA's operator with equal decays, which is the same recurrence. Its output
            gate is KDA's, as in the report's GDN-H (section 5.2).
    mamba2  Mamba2 (arXiv 2405.21060): one decay per head, no delta rule; keys (B), queries (C) and
            values (x) of each head behind short convolutions, the input scaled by its step, a skip
            connection, an RMS norm of the output times a SiLU gate. On a GPU FLA's `chunk_gla`
            with equal decays, which is its recurrence; elsewhere the quadratic form.
    mla     This package's latent attention, without positions.

All have heads of the same key and value size, so the same size of state.

Shapes: B rows, T tokens, D hidden size, H heads, K key and value size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.layers.delta_attention import KimiLinearDeltaAttention, KimiLinearShortConv
from kimi_linear.ops.fla.backend import resolve_backend
from kimi_linear.ops.kda import kda_attention
from kimi_linear.ops.runtime import no_autocast

MIXERS = ("kda", "gdn", "mamba2", "mla")


class GatedDeltaNet(KimiLinearDeltaAttention):
    """KDA's layer with one decay per head."""

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.f_a_proj, self.f_b_proj
        self.a_proj = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        _initialise(self, config.initializer_range)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        x = hidden_states
        projections = (self.q_proj, self.k_proj, self.v_proj)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        q, k, v = (
            self._heads(conv(proj(x))[0])
            for proj, conv in zip(projections, convolutions, strict=True)
        )
        out = gated_delta_rule(
            q, k, v, self.a_proj(x), self.b_proj(x), A_log=self.A_log, dt_bias=self.dt_bias
        )
        gate = self._heads(self.g_b_proj(self.g_a_proj(x)))
        return self.o_proj(self.o_norm(out, gate).flatten(-2)), None


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    backend: str = "auto",
) -> Tensor:
    """The gated delta rule with keys and queries of length 1.

    Args:
        q, k, v: [B, T, H, K].
        a: [B, T, H], before bias and softplus.
        beta: [B, T, H], before the sigmoid.
        A_log: log decay rate, H elements.
        dt_bias: [H], or [H * K], with which channels of a head decay differently.
        backend: "auto", "fla" or "torch".

    Returns:
        [B, T, H, K].
    """
    # FLA's `chunk_gated_delta_rule` refuses its backward on Hopper with Triton 3.4 to 3.7.0
    width = q.shape[-1]
    wide = a.unsqueeze(-1).expand(*a.shape, width)
    bias = dt_bias if dt_bias.numel() > a.shape[-1] else dt_bias.repeat_interleave(width)
    return kda_attention(q, k, v, wide, beta, A_log=A_log, dt_bias=bias, backend=backend)[0]


class Mamba2(nn.Module):
    """Mamba2's layer, with keys and queries of their own in every head."""

    def __init__(self, config: KimiLinearConfig, layer_idx: int) -> None:
        super().__init__()
        linear = config.linear_attn_config
        self.num_heads, self.head_dim = linear["num_heads"], linear["head_dim"]
        hidden, inner = config.hidden_size, self.num_heads * self.head_dim
        self.in_proj = nn.Linear(hidden, 4 * inner + self.num_heads, bias=False)
        self.conv1d = KimiLinearShortConv(3 * inner, linear["short_conv_kernel_size"])
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = nn.RMSNorm(inner, config.rms_norm_eps)
        self.o_proj = nn.Linear(inner, hidden, bias=False)
        _initialise(self, config.initializer_range)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        inner = self.num_heads * self.head_dim
        gate, mixed, dt = self.in_proj(hidden_states).split([inner, 3 * inner, self.num_heads], -1)
        mixed = self.conv1d(mixed)[0]
        x, k, q = mixed.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        step = F.softplus(dt.float() + self.dt_bias)
        g = -self.A_log.exp() * step
        out = decayed_attention(q, k, x * step.unsqueeze(-1).to(x.dtype), g)
        out = (out + x * self.D[:, None].to(x.dtype)).flatten(-2)
        return self.o_proj(self.norm((out * F.silu(gate)).float()).to(out.dtype)), None


def decayed_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, backend: str = "auto"
) -> Tensor:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T, read with q_t.

    Args:
        q, k, v: [B, T, H, K].
        g: log decay [B, T, H], <= 0, float32.
        backend: "auto", "fla" or "torch".

    Returns:
        [B, T, H, K].
    """
    if resolve_backend(q, backend, head_dims=(q.shape[-1],)) == "fla":
        from fla.ops.gla import chunk_gla  # `chunk_simple_gla` has the same limit as above

        wide = g.unsqueeze(-1).expand(*g.shape, q.shape[-1]).contiguous()
        return chunk_gla(q, k, v, wide, scale=1.0)[0]
    with no_autocast(q.device):
        total = g.transpose(1, 2).cumsum(-1)  # [B, H, T]
        future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
        scores = torch.einsum("bthk,bshk->bhts", q.to(g.dtype), k.to(g.dtype)) * decay
        return torch.einsum("bhts,bshv->bthv", scores, v.to(g.dtype)).to(v.dtype)


@torch.no_grad()
def _initialise(layer: nn.Module, std: float) -> None:
    """As this package does for KDA, and FLA for the layers themselves."""
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, std)
        elif isinstance(module, KimiLinearShortConv):
            bound = module.weight.shape[2] ** -0.5
            module.weight.uniform_(-bound, bound)
    layer.A_log.uniform_(1, 16).log_()
    step = torch.empty_like(layer.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    layer.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus


def small_config(
    vocab_size: int,
    *,
    num_layers: int = 2,
    num_heads: int = 2,
    head_dim: int = 128,
    full_layers: tuple[int, ...] = (),
    **fields: Any,
) -> KimiLinearConfig:
    """A model with dense MLPs, as wide as its heads together.

    Args:
        vocab_size: Number of ids.
        num_layers, num_heads, head_dim: Sizes; those of section 5.1 are the defaults.
        full_layers: Layers of latent attention, counted from 1; the others are KDA.
        **fields: Further fields of the configuration.
    """
    hidden = num_heads * head_dim
    sizes: dict[str, Any] = {
        "intermediate_size": 2 * hidden,
        "kv_lora_rank": hidden // 2,
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": head_dim // 2,
        "v_head_dim": head_dim,
        "first_k_dense_replace": num_layers,
        "num_experts": 8,
        "moe_intermediate_size": hidden,
    }
    return KimiLinearConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        linear_attn_config={
            "num_heads": num_heads,
            "head_dim": head_dim,
            "full_attn_layers": list(full_layers),
        },
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **{**sizes, **fields},
    )


def build_model(mixer: str, vocab_size: int, seed: int, **sizes: Any) -> KimiLinearForCausalLM:
    """A new model whose attention layers are all of one kind.

    Args:
        mixer: One of `MIXERS`.
        vocab_size: Number of ids.
        seed: Of the weights.
        **sizes: See `small_config`.

    Raises:
        ValueError: If there is no such kind.
    """
    if mixer not in MIXERS:
        raise ValueError(f"model {mixer!r} is not allowed: it must be one of {', '.join(MIXERS)}")
    layers = sizes.get("num_layers", 2)
    full = tuple(range(1, layers + 1)) if mixer == "mla" else ()
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(small_config(vocab_size, full_layers=full, **sizes))
    others = {"gdn": GatedDeltaNet, "mamba2": Mamba2}
    if mixer in others:
        for i, layer in enumerate(model.model.layers):
            layer.self_attn = others[mixer](model.config, i)
    return model
