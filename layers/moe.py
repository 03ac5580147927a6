"""The mixture of experts: router, routed experts, shared experts.

Source: arXiv 2510.26692, section 4, after DeepSeek-V3 (arXiv 2412.19437, section 2.1.2). Attribute
names are the released checkpoints' names but for the experts, which are fused into two tensors.

Shapes: B batch, T tokens, D hidden size, E experts, k experts of one token.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.layers.mlp import KimiLinearMLP
from kimi_linear.ops.experts import EXPERTS
from kimi_linear.ops.experts.choice import choose_experts
from kimi_linear.ops.quantized import indexed_weights
from kimi_linear.ops.wide_product import wide_linear
from kimi_linear.upstream.interfaces import use_experts_implementation


class KimiLinearRouter(nn.Module):
    """Choice and weights of each token's experts, in float32."""

    e_score_correction_bias: Tensor

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        # moves the choice only, and has no gradient; a buffer so that optimizers leave it alone
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor, notes: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """[tokens, D] to logits [tokens, E], weights and experts [tokens, k]; float32, int64.

        `notes` are `training/router_losses.py`'s.
        """
        config = self.config
        logits = wide_linear(x, self.weight)
        weights, experts = choose_experts(
            logits,
            self.e_score_correction_bias,
            config.num_experts_per_token,
            renormalize=config.moe_renormalize,
            factor=config.routed_scaling_factor,
            is_sigmoid=config.moe_router_activation_func == "sigmoid",
            num_groups=config.num_expert_group,
            num_kept_groups=config.topk_group,
        )
        if notes is not None:
            notes.count(experts)
        return logits, weights, experts


@use_experts_implementation(experts_interface=EXPERTS)
class KimiLinearExperts(nn.Module):
    """The routed experts, fused; Transformers' experts interface picks the forward."""

    config: KimiLinearConfig  # set by the decorator

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        size = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * size, config.hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, size))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, D], experts and weights [tokens, k] to [tokens, D], one expert at a time."""
        gate_up_proj, down_proj = map(indexed_weights, (self.gate_up_proj, self.down_proj))
        out = torch.zeros_like(hidden_states, dtype=top_k_weights.dtype)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # another rank's, under expert parallelism
                continue
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], gate_up_proj[expert]).chunk(2, dim=-1)
            expert_out = F.linear(self.act_fn(gate) * up, down_proj[expert])
            out = out.index_add(0, token, expert_out * top_k_weights[token, slot, None])
        return out.to(hidden_states.dtype)

    def split_size(self) -> tuple[str, int, int]:
        """What tensor parallelism divides: field, size, and what a part is a multiple of."""
        return "moe_intermediate_size", self.down_proj.shape[2], 8


class KimiLinearMoE(nn.Module):
    """Routed experts plus the experts that every token uses."""

    def __init__(self, config: KimiLinearConfig) -> None:
        super().__init__()
        self.gate = KimiLinearRouter(config)
        self.experts = KimiLinearExperts(config)
        if config.num_shared_experts:
            self.shared_experts = KimiLinearMLP(
                config, config.moe_intermediate_size * config.num_shared_experts
            )

    def forward(self, x: Tensor, notes: Any = None) -> Tensor | tuple[Tensor, Tensor]:
        """[B, T, D] to [B, T, D], and with `notes` the router's losses [B * T, 2]."""
        tokens = x.flatten(0, -2)
        # by keyword: hooks of parallel plans put other positional arguments in place of these
        logits, weights, experts = self.gate(tokens, notes=notes)
        out = self.experts(tokens, experts, weights).view_as(x)
        if hasattr(self, "shared_experts"):
            shared = self.shared_experts(x)
            out = out + shared if torch.is_grad_enabled() else out.add_(shared)
        return out if notes is None else (out, notes.losses(logits))
