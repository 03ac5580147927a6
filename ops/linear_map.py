"""The matrix that a module in a linear layer's place stands for.

Shapes: I inputs, O outputs.
"""

import torch
from torch import Tensor, nn

from kimi_linear.ops.runtime import plain_weight


def linear_map(proj: nn.Module, num_inputs: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight [O, I] and bias [O] or None of what `proj` computes.

    Adapters, quantised weights, and weights that are elsewhere between calls are asked by calling
    the module with unit vectors, of the dtype and on the device of `like`.
    """
    weight = plain_weight(proj)
    if weight is not None:
        return weight, None
    eye = torch.eye(num_inputs, dtype=like.dtype, device=like.device)
    weight = proj(eye).transpose(0, 1)
    if not any(name.rpartition(".")[2] == "bias" for name, _ in proj.named_parameters()):
        return weight, None
    bias = proj(torch.zeros_like(eye[:1]))[0]
    return weight - bias[:, None], bias


def is_linear_map(proj: nn.Module) -> bool:
    """Whether `proj` is a linear layer itself, quantised, offloaded by accelerate or with PEFT's
    adapters, and has no hooks that could change what it gives."""
    if any(each._forward_hooks or each._forward_pre_hooks for each in proj.modules()):
        return False
    if "forward" in vars(proj) and not hasattr(proj, "_hf_hook"):
        return False
    return isinstance(proj, nn.Linear) or hasattr(proj, "base_layer")
