"""Cross entropy of a linear layer's outputs, which are never all there at once.

At a vocabulary of 163,840 the logits of 8,192 tokens and their gradient, in float32, take 10 GB,
more than the rest of a small model's step. Here a chunk of tokens at a time goes through the head:
logits, loss, and at once the gradients of hidden states and head, so that nothing of [tokens,
vocabulary] is kept, nor made again in the backward pass (as FLA and Liger Kernel do it, but with
the head's gradient summed in float32 by products of 16-bit numbers).

Shapes: N tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_linear.ops.cross_entropy.kernels import loss_and_gradient, reference_loss_and_gradient
from kimi_linear.ops.quantized import plain_weights
from kimi_linear.ops.runtime import has_kernels, no_autocast, product_dtype
from kimi_linear.ops.wide_product import add_wide_product, wide_product

# Logits of a chunk: 512 MB in float32.
CHUNK_ELEMENTS = 1 << 27
# The head's gradient is read and written once a chunk: small ones would do little else.
MIN_CHUNK_TOKENS = 64


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Cross entropy of the logits `x @ weight.T`.

    Its gradients are computed with it; a second backward pass through it is refused.

    Args:
        x_ND: Hidden states; under autocast the products are of its dtype.
        weight_VD: The head.
        labels_N: int64, the token that each one has to predict.
        num_items_in_batch: The sum is divided by this; None: by the number of labels that count.
        ignore_index: The label of tokens that do not count.

    Returns:
        The loss, in float32, or float64 for such products.
    """
    dtype = product_dtype(x_ND)
    wide = torch.promote_types(dtype, torch.float32)
    if num_items_in_batch is None:
        num_items_in_batch = (labels_N != ignore_index).sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(x_ND.device)
    scale = torch.ones((), dtype=wide, device=x_ND.device) / num_items_in_batch
    return _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, scale.to(wide), ignore_index, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, and only scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        scale: Tensor,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> Tensor:
        with no_autocast(x_ND.device):
            loss, dx_ND, dweight_VD = _by_chunks(
                x_ND.to(dtype),
                plain_weights(weight_VD, dtype),
                labels_N,
                scale,
                ignore_index,
                ctx.needs_input_grad[:2],
            )
        ctx.gradients = [
            None if grad is None else grad.to(of.dtype)
            for grad, of in ((dx_ND, x_ND), (dweight_VD, weight_VD))
        ]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward pass through loss_backend='fused' is not possible, since the "
                "first one's gradients took the place of what it needs: 'logits' allows it"
            )
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if each is None else each.mul_(grad.to(each.dtype)) for each in gradients]
        return *scaled, None, None, None, None


def _by_chunks(
    x_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    scale: Tensor,
    ignore_index: int,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and of the gradients of `x` and `weight` those `wanted`; that of the head wide."""
    N, V = x_ND.shape[0], weight_VD.shape[0]
    wide, size = scale.dtype, chunk_tokens(V)
    dx_ND = torch.empty_like(x_ND) if wanted[0] else None
    dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if wanted[1] else None
    losses_N = torch.zeros(N, dtype=wide, device=x_ND.device)
    for start in range(0, N, size):
        chunk = slice(start, start + size)
        logits_CV = wide_product(x_ND[chunk], weight_VD.t(), wide)
        compute = loss_and_gradient if has_kernels(logits_CV) else reference_loss_and_gradient
        losses_N[chunk], grad_CV = compute(
            logits_CV, labels_N[chunk], scale, ignore_index, x_ND.dtype
        )
        del logits_CV
        if dx_ND is not None:
            torch.mm(grad_CV, weight_VD, out=dx_ND[chunk])
        if dweight_VD is not None:
            add_wide_product(dweight_VD, grad_CV.t(), x_ND[chunk])
        del grad_CV
    return losses_N.sum() * scale, dx_ND, dweight_VD


def chunk_tokens(vocab_size: int) -> int:
    """C: a power of two, the largest that keeps a chunk's logits within `CHUNK_ELEMENTS`."""
    return max(MIN_CHUNK_TOKENS, 1 << max(0, (CHUNK_ELEMENTS // vocab_size).bit_length() - 1))
