"""Triton kernel of the loss: from a row of logits its loss and its gradient, in two reads.

Sums are in float32, in a fixed order. Shapes: C tokens of a chunk, V vocabulary.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

from __future__ import annotations  # "tl.constexpr" means nothing where there is no triton

import torch
from torch import Tensor

from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import jit, power_of_two, tl


def reference_loss_and_gradient(
    logits_CV: Tensor, labels_C: Tensor, scale: Tensor, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each token, [C] in the logits' dtype, and `scale` times its gradient,
    [C, V] in `dtype`; both 0 where the label is `ignore_index`. The logits may be written over."""
    counts = labels_C != ignore_index
    places = labels_C.where(counts, 0)[:, None]
    logp_CV = logits_CV.log_softmax(dim=-1)
    losses_C = -logp_CV.gather(1, places)[:, 0].where(counts, 0)
    grad_CV = logp_CV.exp_()
    grad_CV.scatter_add_(1, places, torch.full_like(places, -1, dtype=grad_CV.dtype))
    grad_CV.mul_(scale).masked_fill_(~counts[:, None], 0)
    return losses_C, grad_CV.to(dtype)


def loss_and_gradient(
    logits_CV: Tensor, labels_C: Tensor, scale: Tensor, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Triton version, one program a token; the loss of a label outside the vocabulary is NaN."""
    C, V = logits_CV.shape
    losses_C = logits_CV.new_empty(C, dtype=torch.float32)
    grad_CV = logits_CV if logits_CV.dtype == dtype else logits_CV.new_empty(C, V, dtype=dtype)
    if C:
        with torch.cuda.device_of(logits_CV):
            _loss_and_gradient[(C,)](
                logits_CV,
                labels_C,
                scale,
                losses_C,
                grad_CV,
                V,
                ignore_index,
                BLOCK=min(8192, power_of_two(V)),
                num_warps=8,
            )
    return losses_C, grad_CV


@launch_directly
@jit
def _loss_and_gradient(
    logits, labels, scale, losses, grads, size, ignore_index, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * size
    grads += row * size
    label = tl.load(labels + row)
    counts = label != ignore_index
    length = tl.where(counts, size, 0)  # ignored rows are not read
    block = tl.arange(0, BLOCK)
    largest = float("-inf")
    total = 0.0
    for start in range(0, length, BLOCK):
        inside = start + block < length
        x = tl.load(logits + start + block, mask=inside, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), axis=0)
    log_total = largest + tl.log(total)
    is_known = (label >= 0) & (label < size)
    own = tl.load(logits + label, mask=counts & is_known, other=0.0).to(tl.float32)
    loss = tl.where(is_known, log_total - own, float("nan"))
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    tl.debug_barrier()  # the label's logit is read before its gradient takes its place
    factor = tl.load(scale)
    for start in range(0, size, BLOCK):
        column = start + block
        x = tl.load(logits + column, mask=column < length, other=float("-inf")).to(tl.float32)
        grad = (tl.exp(x - log_total) - tl.where(column == label, 1.0, 0.0)) * factor
        grad = tl.where(counts, grad, 0.0)
        tl.store(grads + column, grad.to(grads.dtype.element_ty), mask=column < size)
