"""Routed experts of many tokens: Transformers' "grouped_mm", and a leaner form of it.

Both sort the pairs of a token and one of its experts by expert and multiply each expert's rows by
its matrices in one grouped product. Ours takes over where no graph is recorded: it goes through the
tokens in pieces, so that memory does not grow with their number, and what lies between the products
(rows by expert, gated SiLU, weighted sum) is one kernel each, in the order of the slots, so that
results do not change from run to run.

Shapes: T tokens, D hidden size, I expert width, E experts, k experts of one token, P = T * k pairs.
"""

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from .prefill_kernels import has_kernels, silu_mul, take_rows, weighted_sum

# Tokens of a piece: 75 KB each at the 48B model's sizes, and every expert has its 1,024.
PIECE_TOKENS = 32768
# torch._grouped_mm's on CUDA; Hopper and later have the fast one
GROUPED_DTYPES = (torch.bfloat16,)


def grouped_experts(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """[T, D], experts and weights [T, k] to [T, D].

    An expert's number of E or more is another rank's: it adds nothing.
    """
    if not _is_lean(experts, hidden_states):
        transformers_own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
        return transformers_own(experts, hidden_states, top_k_index, top_k_weights)
    if hidden_states.shape[0] <= PIECE_TOKENS:
        return _grouped(experts, hidden_states, top_k_index, top_k_weights)
    out = torch.empty_like(hidden_states)
    for start in range(0, hidden_states.shape[0], PIECE_TOKENS):
        piece = slice(start, start + PIECE_TOKENS)
        out[piece] = _grouped(
            experts, hidden_states[piece], top_k_index[piece], top_k_weights[piece]
        )
    return out


def _is_lean(experts: nn.Module, x: Tensor) -> bool:
    """Whether our form takes these experts and this input."""
    up, down = experts.gate_up_proj, experts.down_proj
    return (
        has_kernels(x, up, down)
        and x.dtype == up.dtype == down.dtype
        and x.dtype in GROUPED_DTYPES
        and hasattr(torch, "_grouped_mm")
        and experts.config.hidden_act in ("silu", "swish")
        and x.shape[1] % 8 == down.shape[2] % 8 == 0
        and torch.cuda.get_device_capability(x.device)[0] >= 9
    )


def _grouped(experts: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """One piece of tokens."""
    num_experts, num_chosen = experts.gate_up_proj.shape[0], index.shape[1]
    # sorting int16 takes two passes where int64 takes eight
    keys, order = index.flatten().to(torch.int16).sort(stable=True)
    numbers = torch.arange(num_experts, dtype=torch.int16, device=x.device)
    ends = torch.searchsorted(keys, numbers, right=True, out_int32=True)
    place = torch.empty_like(order)
    place.scatter_(0, order, torch.arange(order.numel(), device=x.device))
    rows = take_rows(x, order // num_chosen)
    both = torch._grouped_mm(rows, experts.gate_up_proj.transpose(1, 2), offs=ends)
    del rows
    inner = silu_mul(*both.chunk(2, dim=1))
    del both
    out = torch._grouped_mm(inner, experts.down_proj.transpose(1, 2), offs=ends)
    return weighted_sum(out, place.view_as(index), weights, index, num_experts)


EXPERTS = ExpertsInterface()
EXPERTS["grouped_mm"] = grouped_experts

__all__ = ["EXPERTS", "grouped_experts"]
