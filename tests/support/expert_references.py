"""What the experts' kernels compute, in torch.

Shapes: T tokens, D hidden size, I expert width, E experts, k experts of one token, P = T * k pairs
of a token and one of its experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_gate_up(x: Tensor, order: Tensor, ends: Tensor, weight: Tensor, k: int) -> Tensor:
    """[P, I], by expert: silu(gate) * up of the tokens' rows x [T, D], for weight [E, 2 I, D]."""
    out = x.new_zeros(order.numel(), weight.shape[1] // 2)
    for expert, (start, end) in enumerate(_spans(ends)):
        rows = x[order[start:end] // k].float()
        gate, up = (rows @ weight[expert].float().T).chunk(2, dim=1)
        out[start:end] = (F.silu(gate) * up).to(x.dtype)
    return out


def reference_down(inner: Tensor, order: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    """[P, D], in the pairs' order, from inner [P, I] by expert and weight [E, D, I]."""
    out = inner.new_zeros(order.numel(), weight.shape[1])
    for expert, (start, end) in enumerate(_spans(ends)):
        product = inner[start:end].float() @ weight[expert].float().T
        out[order[start:end]] = product.to(inner.dtype)
    return out


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops[:-1]], stops, strict=True))


def reference_weighted_sum(
    pairs: Tensor, weights: Tensor, experts: Tensor, num_experts: int
) -> Tensor:
    """[T, D] from the pairs' rows [P, D], weights [T, k] and experts [T, k].

    Rows of experts that there are not, of number `num_experts` or more, do not count.
    """
    counts = (experts < num_experts)[..., None]
    rows = (pairs.float().unflatten(0, weights.shape) * weights.float()[..., None]).where(counts, 0)
    return rows.sum(dim=1).to(pairs.dtype)


def reference_choice_backward(
    logits: Tensor, experts: Tensor, grad: Tensor, renormalize: bool, factor: float
) -> Tensor:
    """The gradient of logits [T, E], of that of the weights of the chosen experts.

    Args:
        logits: [T, E].
        experts: [T, k] int64, all different in a row.
        grad: [T, k], of sigmoid(logits) at the experts, divided by their sum if they are
            renormalised, times `factor`.
    """
    scores = logits.sigmoid().gather(1, experts)
    grad = grad * factor
    if renormalize:
        total = scores.sum(dim=-1, keepdim=True) + 1e-20
        grad = (grad - (grad * scores).sum(dim=-1, keepdim=True) / total) / total
    return torch.zeros_like(logits).scatter(1, experts, grad * scores * (1 - scores))
