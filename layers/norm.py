"""RMS norm, plain and gated."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_linear.ops.gated_norm import gated_rms_norm


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
