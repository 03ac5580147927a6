"""Names of what has NaN or Inf: gradients, weights, an optimizer's states."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


def not_finite_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient, as far as it is on this process, has NaN or Inf."""
    return _not_finite({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def not_finite_weights(model: nn.Module) -> list[str]:
    """Names of the parameters and saved buffers that have NaN or Inf, on this process."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                weights[f"{prefix}.{name}" if prefix else name] = buffer
    return _not_finite(weights)


def not_finite_states(optimizer: Any, model: nn.Module) -> list[str]:
    """Names of the optimizer's states that have NaN or Inf, as "parameter: state"."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    states = {
        f"{names.get(id(parameter), '?')}: {key}": value
        for parameter, state in dict(getattr(optimizer, "state", None) or {}).items()
        if isinstance(state, dict)
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    return _not_finite(states)


@torch.no_grad()
def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Whether there are any is found by few kernels and one wait for the device: the largest value
    says it; a sum of squares could overflow without any NaN or Inf."""
    here = {n: x.to_local() if hasattr(x, "to_local") else x for n, x in tensors.items()}
    here = {n: x for n, x in here.items() if x.numel() and x.is_floating_point()}
    largest = get_total_norm(list(here.values()), norm_type=float("inf")) if here else None
    if largest is None or bool(largest.isfinite()):
        return []
    return [name for name, x in here.items() if not bool(x.isfinite().all())]
