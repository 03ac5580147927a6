"""Which experts a token uses, and with what weights.

Source: arXiv 2510.26692, section 4, after DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).

Shapes: T tokens, E experts, k experts of one token, G groups of experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kimi_linear.ops.experts.choice_kernels import launch_choice, launch_choice_backward
from kimi_linear.ops.runtime import has_kernels


def choose_experts(
    logits: Tensor,
    bias: Tensor,
    num_chosen: int,
    *,
    renormalize: bool,
    factor: float,
    is_sigmoid: bool = True,
    num_groups: int = 1,
    num_kept_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """The k experts whose score and bias sum highest.

    Args:
        logits: [T, E], in at least float32.
        bias: [E], moves the choice and not the weights.
        num_chosen: k.
        renormalize: divide a token's weights by their sum; as released, not for one expert.
        factor: multiplies the weights.
        is_sigmoid: scores are sigmoids of the logits, else their softmax.
        num_groups: G, equal parts of the experts.
        num_kept_groups: only the experts of this many groups can be chosen, those whose two best
            scores sum highest.

    Returns:
        Weights [T, k], in the dtype of the logits, and experts [T, k] int64.
    """
    bias = bias.to(logits.dtype)
    renormalize = renormalize and num_chosen > 1
    if is_sigmoid and num_groups == num_kept_groups and has_kernels(logits.detach(), bias):
        choose = _Choice.apply if logits.requires_grad else launch_choice
        return choose(logits, bias, num_chosen, renormalize, factor)
    scores = logits.sigmoid() if is_sigmoid else logits.softmax(dim=-1)
    allowed = _within_best_groups(scores + bias, num_groups, num_kept_groups)
    experts = allowed.topk(num_chosen, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * factor, experts


def _within_best_groups(scores: Tensor, num_groups: int, num_kept: int) -> Tensor:
    """[T, E]: the scores, -inf outside the groups that are kept."""
    if num_kept == num_groups:
        return scores
    grouped = scores.unflatten(-1, (num_groups, -1))
    sums = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = sums.topk(num_kept, dim=-1, sorted=False).indices
    outside = torch.ones_like(sums, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(outside.unsqueeze(-1), float("-inf")).flatten(1)


class _Choice(torch.autograd.Function):
    """The kernel of inference, with a gradient for the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor, num_chosen: int, renormalize: bool, factor: float
    ) -> tuple[Tensor, Tensor]:
        weights, experts = launch_choice(logits, bias, num_chosen, renormalize, factor)
        ctx.save_for_backward(logits, experts)
        ctx.renormalize, ctx.factor = renormalize, factor
        ctx.mark_non_differentiable(experts)
        return weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        logits, experts = ctx.saved_tensors
        dlogits = launch_choice_backward(
            logits, experts, grad.contiguous(), ctx.renormalize, ctx.factor
        )
        return dlogits, None, None, None, None
