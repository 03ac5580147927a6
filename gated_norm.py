"""RMS norm over the head, times a sigmoid gate: what stands between KDA and its output projection.

Source: arXiv 2510.26692, section 4 (output gate). FLA's fused kernel on a GPU, torch elsewhere.
Shapes: H heads, V value size; leading dimensions are free.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .fla_tuning import use_known_configs
from .kda import resolve_backend


@functools.cache
def _fla_norm() -> Callable[..., Tensor]:
    """FLA's kernel, imported on first use."""
    try:
        from fla.modules.fused_norm_gate import rms_norm_gated
    except ImportError as error:
        raise ValueError(
            f"backend is 'fla', but this fla has no rms_norm_gated ({error}); "
            "fla-core 0.5.1 or newer is needed, or backend='torch'"
        ) from error
    use_known_configs()
    return rms_norm_gated


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """RMSNorm(x) * weight * sigmoid(gate), computed in float32 (float64 for float64 input).

    Args:
        x: [..., H, V].
        gate: [..., H, V], before the sigmoid.
        weight: [V].
        eps: Added to the mean square.
        backend: "auto", "fla" or "torch".

    Returns:
        [..., H, V] in x's dtype.
    """
    if resolve_backend(x, backend) == "fla":
        return _fla_norm()(x, gate, weight, None, activation="sigmoid", eps=eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = torch.nn.functional.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
    return (normed * torch.sigmoid(gate.to(wide))).to(x.dtype)


__all__ = ["gated_rms_norm"]
