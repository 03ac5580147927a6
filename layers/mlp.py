"""The gated MLP."""

import torch
from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.ops.experts.prefill_kernels import silu_mul
from kimi_linear.ops.joint_training import gated_mlp, trains_jointly
from kimi_linear.ops.runtime import has_kernels, is_exporting, is_plain_silu
from torch import Tensor, nn
from transformers.activations import ACT2FN

# Tokens read at once where no graph is recorded.
MLP_PIECE_TOKENS = 32768


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
