"""Products of one input taken at once, in training on a GPU.

A KDA layer multiplies its input by six matrices and an MLP by two. One at a time, with autograd,
that is a launch each, three in the backward pass and a sum: at some thousand tokens the host takes
longer to launch them than the GPU to run them. Here the matrices are put together, one product is
taken, and what follows (three convolutions in `short_conv/training.py`, the gated SiLU in
`gated_mlp.py`) reads it where it lies. Weights stay parameters of their own, and nothing but the
product is kept.

Shapes: D hidden size, N rows of all matrices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kimi_linear.ops.runtime import KERNEL_DTYPES, is_traced, plain_weight, triton

DEVICES = ("cuda",)  # where it is used


def joint_weights(x: Tensor, linears: Sequence[nn.Module], *others: Tensor) -> list[Tensor] | None:
    """The weights of linear layers whose products with x are taken at once: in training, if they
    are plain and of one dtype; else None.

    Args:
        x: [.., D].
        linears: layers that read x, or what is made of it.
        others: further tensors that may want a gradient.
    """
    if triton is None or x.device.type not in DEVICES or is_traced():
        return None
    # in the first pass of reentrant checkpointing too, which records no gradients
    if not (torch.is_grad_enabled() or linears[0].training) or x.dtype not in KERNEL_DTYPES:
        return None
    weights = []
    for linear in linears:
        weight = plain_weight(linear)
        if weight is None or weight.device != x.device:
            return None
        weights.append(weight)
    dtype = weights[0].dtype
    if dtype not in KERNEL_DTYPES or any(weight.dtype != dtype for weight in weights):
        return None
    return weights if any(t.requires_grad for t in (x, *weights, *others)) else None


def stacked(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[N, D]: the matrices one below the other."""
    return torch.cat(list(matrices)).to(dtype)


def split_gradient(grad: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    """The matrices' gradients, from that of the stacked one [N, D]."""
    parts = grad.split([matrix.shape[0] for matrix in matrices])
    return [part.to(matrix.dtype) for part, matrix in zip(parts, matrices, strict=True)]
