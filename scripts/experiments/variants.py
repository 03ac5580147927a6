"""Variants of Kimi Linear for the ablations of table 1 of arXiv 2510.26692, and those of positions.

    3:1 0:1 1:1 7:1 1:0  KDA layers to MLA layers, as far as the depth allows
    no-gate              3:1 without an output gate behind KDA
    swish-gate           3:1 with SiLU instead of the sigmoid in that gate
    no-conv              3:1 with SiLU alone where the short convolutions are
    rope                 3:1 with rotary positions on the shared part of MLA's keys and queries.
                         The package itself has MLA without positions only; this layer is here.
    0:1-rope             0:1 with them

All variants have about as many parameters: the MLPs' width makes up for what differs.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.layers import small_config
from kimi_linear import KimiLinearForCausalLM
from kimi_linear.layers.delta_attention import KimiLinearDeltaAttention
from kimi_linear.layers.latent_attention import KimiLinearLatentAttention
from kimi_linear.layers.norm import KimiLinearRMSNorm
from kimi_linear.layers.plan import ForwardPlan

# KDA layers to one MLA layer; all of a depth or none: one kind only.
RATIOS: dict[str, tuple[int, int]] = {
    "3:1": (3, 1),
    "0:1": (0, 1),
    "1:1": (1, 1),
    "7:1": (7, 1),
    "1:0": (1, 0),
}
CHANGES = ("no-gate", "swish-gate", "no-conv", "rope", "0:1-rope")
VARIANTS = (*RATIOS, *CHANGES)
ROPE_THETA = 10000.0


class PlainNorm(KimiLinearRMSNorm):
    """The norm behind KDA without its gate."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class SwishGatedNorm(KimiLinearRMSNorm):
    """RMS norm over the head, times a SiLU gate, in float32."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        wide = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return (wide * F.silu(gate.float())).to(x.dtype)


class RotaryLatentAttention(KimiLinearLatentAttention):
    """Latent attention with rotary positions on the shared key part, for calls without a cache."""

    def query(self, x: Tensor) -> Tensor:
        plain, shared = super().query(x).split([self.key_dim, self.shared_key_dim], dim=-1)
        return torch.cat([plain, rotated(shared, dim=1)], dim=-1)  # [B, T, H, K]

    def latent(self, x: Tensor) -> Tensor:
        latent, shared = super().latent(x).split([self.latent_dim, self.shared_key_dim], dim=-1)
        return torch.cat([latent, rotated(shared, dim=1)], dim=-1)

    def _attend_to_latents(
        self, x: Tensor, segments: list[Tensor], plan: ForwardPlan
    ) -> tuple[Tensor, Tensor | None]:
        """Of all queries at once: a tile's would be rotated as if it were the first."""
        out, weights = self._attend(self.query(x), segments, plan.real_tokens, plan.seen)
        return self.o_proj(out.flatten(-2)), weights


def rotated(x: Tensor, dim: int) -> Tensor:
    """Pairs of the last dimension rotated by their position along `dim`."""
    count, half = x.shape[dim], x.shape[-1] // 2
    rates = torch.exp(torch.arange(half, device=x.device) * (-math.log(ROPE_THETA) / half))
    angles = torch.arange(count, device=x.device).unsqueeze(1) * rates
    shape = [count if i == dim else 1 for i in range(x.dim() - 1)]
    cosine, sine = (f(angles).view(*shape, half).to(x.dtype) for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def full_layers(variant: str, num_layers: int) -> tuple[int, ...]:
    """MLA layers of a variant, counted from 1: the last of each group, and the last layer.

    Raises:
        ValueError: For an unknown variant, or a depth that is no multiple of its group.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not allowed: it must be one of {VARIANTS}")
    kda, mla = RATIOS.get(variant.removesuffix("-rope"), RATIOS["3:1"])
    group = kda + mla
    if num_layers % group:
        raise ValueError(
            f"num_layers={num_layers} is not allowed: {variant} needs a multiple of {group}"
        )
    return tuple(n for n in range(1, num_layers + 1) if mla and n % group == 0)


def build_variant(
    variant: str,
    vocab_size: int,
    seed: int,
    *,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    width: int | None = None,
    embedding_scale: float = 1.0,
) -> KimiLinearForCausalLM:
    """A new model of a variant.

    Args:
        variant: One of `VARIANTS`.
        vocab_size: Number of ids.
        seed: Of the weights.
        num_layers, num_heads, head_dim: Sizes; the model is as wide as its heads together.
        width: Of the MLPs; None: twice the model's.
        embedding_scale: How much larger than usual embeddings begin.

    Raises:
        ValueError: As `full_layers` does.
    """
    sizes: dict[str, Any] = {"num_heads": num_heads, "head_dim": head_dim}
    if width is not None:
        sizes["intermediate_size"] = width
    config = small_config(
        vocab_size, num_layers=num_layers, full_layers=full_layers(variant, num_layers), **sizes
    )
    torch.manual_seed(seed)
    model = KimiLinearForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(embedding_scale)
    for layer in model.model.layers:
        attention = layer.self_attn
        if isinstance(attention, KimiLinearDeltaAttention):
            _change_kda(attention, variant, config.rms_norm_eps)
        elif variant.endswith("rope"):
            attention.__class__ = RotaryLatentAttention  # the same weights
    return model


def _change_kda(attention: KimiLinearDeltaAttention, variant: str, eps: float) -> None:
    if variant == "no-gate":
        attention.o_norm = PlainNorm(attention.head_dim, eps)
        # what takes the gate's place is as wide, and not read
        attention.g_a_proj = attention.g_b_proj = nn.Identity()
    elif variant == "swish-gate":
        attention.o_norm = SwishGatedNorm(attention.head_dim, eps)
    elif variant == "no-conv":
        for conv in (attention.q_conv1d, attention.k_conv1d, attention.v_conv1d):
            with torch.no_grad():  # the token itself, before SiLU
                conv.weight.zero_()[..., -1] = 1
            conv.weight.requires_grad_(False)


def count_parameters(model: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def matched_width(variant: str, target: int, vocab_size: int, **sizes: Any) -> int:
    """Width of the MLPs, a multiple of 8, with which a variant has about `target` parameters."""
    with torch.device("meta"):
        narrow, wide = (
            count_parameters(build_variant(variant, vocab_size, 0, width=width, **sizes))
            for width in (8, 16)
        )
    return max(8, 8 + 8 * round((target - narrow) / (wide - narrow)))
