"""Triton kernels of the feed-forward layers, where no graph is recorded: choice of experts, gated
SiLU, and the weighted sum of what a token's experts say.

Each reads its inputs once and writes its output once; the chains of torch operators that they take
the place of are beside them, as `reference_...`. Sums are in float32, in a fixed order.

Shapes: M rows, T tokens, D hidden size, I expert width, E experts, k experts of one token,
P = T * k pairs of a token and one of its experts.
"""

# mypy: disable-error-code=no-untyped-def
# (a kernel's arguments are Triton's)

import torch
from kimi_linear.ops.launch import launch_directly
from kimi_linear.ops.runtime import has_kernels
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


# ---------------------------------------------------------------------------------- weighted sum
def reference_weighted_sum(
    pairs: Tensor, weights: Tensor, experts: Tensor, num_experts: int
) -> Tensor:
    """[T, D] from the pairs' rows [P, D], weights [T, k] and experts [T, k].

    Rows of experts that there are not, of number `num_experts` or more, do not count.
    """
    counts = (experts < num_experts)[..., None]
    rows = (pairs.float().unflatten(0, weights.shape) * weights.float()[..., None]).where(counts, 0)
    return rows.sum(dim=1).to(pairs.dtype)


def weighted_sum(pairs: Tensor, weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """The same, one program a token; rows that do not count are not read."""
    (T, k), D = weights.shape, pairs.shape[1]
    out = pairs.new_empty(T, D)
    if T:
        block = triton.next_power_of_2(D)
        with torch.cuda.device_of(pairs):
            _weighted_sum[(T,)](
                pairs, weights, experts, out, D, num_experts, NUM=k, BLOCK=block, num_warps=8
            )
    return out


# ---------------------------------------------------------------------------- choice of experts
def reference_choose_experts(
    logits: Tensor, bias: Tensor, num_chosen: int, renormalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """Weights [T, k] float32 and experts [T, k] int64 by sigmoid; `bias` [E] moves the choice."""
    scores = logits.sigmoid()
    experts = (scores + bias).topk(num_chosen, dim=-1).indices
    weights = scores.gather(1, experts)
    if renormalize and num_chosen > 1:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * factor, experts


def choose_experts(
    logits: Tensor, bias: Tensor, num_chosen: int, renormalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """The same; of equal scores the lower number is chosen."""
    T, E = logits.shape
    weights = logits.new_empty(T, num_chosen)
    experts = torch.empty(T, num_chosen, dtype=torch.int64, device=logits.device)
    if T:
        rows = 8
        with torch.cuda.device_of(logits):
            _choose_experts[(triton.cdiv(T, rows),)](
                logits,
                bias,
                weights,
                experts,
                T,
                E,
                factor,
                NUM=num_chosen,
                NUM_BLOCK=triton.next_power_of_2(num_chosen),
                RENORMALIZE=renormalize and num_chosen > 1,
                ROWS=rows,
                BLOCK=triton.next_power_of_2(E),
            )
    return weights, experts


# --------------------------------------------------------------------------------------- kernels
if triton is not None:

    @launch_directly
    @triton.jit
    def _weighted_sum(
        pairs, weights, experts, out, size, num_experts, NUM: tl.constexpr, BLOCK: tl.constexpr
    ):
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for slot in tl.static_range(NUM):
            pair = token * NUM + slot
            weight = tl.load(weights + pair).to(tl.float32)
            length = tl.where(tl.load(experts + pair) < num_experts, size, 0)
            values = tl.load(pairs + pair * size + column, mask=column < length, other=0.0)
            total += weight * values.to(tl.float32)
        tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=column < size)

    @launch_directly
    @triton.jit
    def _choose_experts(
        logits,
        bias,
        weights,
        experts,
        num_tokens,
        num_experts,
        factor,
        NUM: tl.constexpr,
        NUM_BLOCK: tl.constexpr,
        RENORMALIZE: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        expert = tl.arange(0, BLOCK)
        slot = tl.arange(0, NUM_BLOCK)
        real = (token < num_tokens)[:, None] & (expert < num_experts)[None, :]
        score = tl.load(logits + token[:, None] * num_experts + expert[None, :], mask=real, other=0)
        score = tl.sigmoid(score.to(tl.float32))
        moved = score + tl.load(bias + expert, mask=expert < num_experts, other=0)[None, :]
        moved = tl.where(expert[None, :] < num_experts, moved, float("-inf"))
        chosen = tl.zeros((ROWS, NUM_BLOCK), dtype=tl.int32)
        weight = tl.zeros((ROWS, NUM_BLOCK), dtype=tl.float32)
        for i in range(NUM):
            best = tl.argmax(moved, axis=1)
            is_best = expert[None, :] == best[:, None]
            here = slot[None, :] == i
            chosen = tl.where(here, best[:, None], chosen)
            own = tl.sum(tl.where(is_best, score, 0.0), axis=1)
            weight = tl.where(here, own[:, None], weight)
            moved = tl.where(is_best, float("-inf"), moved)
        if RENORMALIZE:
            weight = weight / (tl.sum(weight, axis=1)[:, None] + 1e-20)
        chosen = tl.minimum(tl.maximum(chosen, 0), num_experts - 1)  # also where logits are NaN
        place = token[:, None] * NUM + slot[None, :]
        inside = (token < num_tokens)[:, None] & (slot < NUM)[None, :]
        tl.store(weights + place, weight * factor, mask=inside)
        tl.store(experts + place, chosen.to(tl.int64), mask=inside)


__all__ = [
    "choose_experts",
    "has_kernels",
    "reference_choose_experts",
    "reference_weighted_sum",
    "weighted_sum",
]
