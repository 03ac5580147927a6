"""Kimi Delta Attention and Gated DeltaNet with decays between the two, and how long states last.

KDA differs from Gated DeltaNet in its decay alone, but in three things about it at once: each
channel has one, each begins somewhere else, and what the token says of it passes through two thin
matrices instead of one row for each head. These models take the three apart:

    kda-even    KDA whose channels begin with the same decay in a head, as Gated DeltaNet's do
    kda-slow    KDA whose decays begin a hundred times slower
    kda-full    KDA whose token-dependent decays come from one full matrix
    gdn-spread  Gated DeltaNet whose channels begin as KDA's do, and learn a bias each; what the
                token says is one number for each head still
    gdn-slow    Gated DeltaNet whose decays begin a hundred times slower

Shapes: B rows, T tokens, D hidden size, H heads, K key size.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.layers import GatedDeltaNet, build_model
from kimi_linear import KimiLinearForCausalLM
from kimi_linear.layers.delta_attention import KimiLinearDeltaAttention
from kimi_linear.ops.kda.recurrent import log_decay

SLOWER = 100.0
QUANTILES = (0.1, 0.5, 0.9)


@torch.no_grad()
def _even(layer: KimiLinearDeltaAttention) -> None:
    bias = layer.dt_bias.view(layer.num_heads, layer.head_dim)
    bias.copy_(bias[:, :1].clone().expand_as(bias))


@torch.no_grad()
def _slow(layer: KimiLinearDeltaAttention) -> None:
    step = F.softplus(layer.dt_bias) / SLOWER
    layer.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus


@torch.no_grad()
def _full(layer: KimiLinearDeltaAttention) -> None:
    thin = layer.f_b_proj
    hidden, inner = layer.q_proj.in_features, thin.out_features
    matrix = nn.Linear(hidden, inner, bias=False)
    matrix.weight.normal_(0, float(thin.weight.std()))
    layer.f_a_proj, layer.f_b_proj = nn.Identity(), matrix


@torch.no_grad()
def _spread(layer: KimiLinearDeltaAttention) -> None:
    step = torch.empty(layer.num_heads * layer.head_dim)
    step.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    layer.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))


# The layer that a kind begins as, and what is changed in it.
DECAYS: Mapping[str, tuple[str, Callable[[KimiLinearDeltaAttention], None]]] = {
    "kda-even": ("kda", _even),
    "kda-slow": ("kda", _slow),
    "kda-full": ("kda", _full),
    "gdn-spread": ("gdn", _spread),
    "gdn-slow": ("gdn", _slow),
}


def build_with_decays(kind: str, vocab_size: int, seed: int, **sizes: int) -> KimiLinearForCausalLM:
    """As `build_model`, and for the keys of `DECAYS`."""
    mixer, change = DECAYS.get(kind, (kind, None))
    model = build_model(mixer, vocab_size, seed, **sizes)
    if change is not None:
        for layer in model.model.layers:
            change(layer.self_attn)
    return model


def half_lives(model: KimiLinearForCausalLM, ids: Tensor) -> list[list[float]]:
    """How many tokens a state's channels take to lose half, in each layer that has decays.

    Args:
        ids: [B, T], whose mean log decay is taken.

    Returns:
        For each layer the `QUANTILES` over its channels.
    """
    found: list[list[float]] = []

    def read(layer: KimiLinearDeltaAttention, inputs: tuple[Tensor, ...], _: object) -> None:
        mean = _log_decays(layer, inputs[0]).mean((0, 1)).flatten()
        lives = (-math.log(2) / mean).double()
        quantiles = lives.quantile(lives.new_tensor(QUANTILES)).tolist()
        found.append([round(value, 2) for value in quantiles])

    layers = [layer.self_attn for layer in model.model.layers]
    hooks = [
        layer.register_forward_hook(read)
        for layer in layers
        if isinstance(layer, KimiLinearDeltaAttention)
    ]
    try:
        with torch.no_grad():
            model.model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _log_decays(layer: KimiLinearDeltaAttention, x: Tensor) -> Tensor:
    """[B, T, H, K], or [B, T, H, 1] with one decay for each head; float32."""
    if isinstance(layer, GatedDeltaNet):
        raw = layer.a_proj(x).float().unsqueeze(-1)  # [B, T, H, 1]
        raw = raw.expand(*raw.shape[:-1], layer.dt_bias.numel() // layer.num_heads)
    else:
        raw = layer.f_b_proj(layer.f_a_proj(x)).float().unflatten(-1, (layer.num_heads, -1))
    return log_decay(raw, layer.A_log, layer.dt_bias)
