"""The gated MLP."""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from kimi_linear.configuration_kimi_linear import KimiLinearConfig
from kimi_linear.ops.gated_mlp import gated_mlp


class KimiLinearMLP(nn.Module):
    """Gated MLP."""

    def __init__(self, config: KimiLinearConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return gated_mlp(x, self.gate_proj, self.up_proj, self.down_proj, self.act_fn)

    def split_size(self) -> tuple[str, int, int]:
        """What tensor parallelism divides: field, size, and what a part is a multiple of."""
        return "intermediate_size", self.down_proj.in_features, 1
