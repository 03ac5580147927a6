"""Routed experts of many tokens: Transformers' "grouped_mm", and leaner forms of it.

All sort the pairs of a token and one of its experts by expert and multiply each expert's rows by
its matrices. `grouped_experts` is the entry. Where no graph is recorded, on Hopper and later,
`prefill.py` has what stands around the products inside their kernels; in training, `training.py`
keeps less for the backward pass. Any other experts implementation than "grouped_mm" turns both off.

Shapes: T tokens, D hidden size, k experts of one token.
"""

from typing import Any

from torch import Tensor

from kimi_linear.ops.experts.prefill import can_prefill, prefill_experts, refuse
from kimi_linear.ops.experts.training import train_experts, trains_lean
from kimi_linear.ops.quantized import quick_attributes
from kimi_linear.ops.runtime import TritonError
from kimi_linear.upstream.interfaces import ALL_EXPERTS_FUNCTIONS, ExpertsInterface


def grouped_experts(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of what each token's experts say.

    Args:
        experts: a `KimiLinearExperts`.
        hidden_states: [T, D].
        top_k_index: [T, k] int64; a number of E or more is another rank's expert and adds nothing.
        top_k_weights: [T, k].

    Returns:
        [T, D].
    """
    with quick_attributes():
        if can_prefill(experts, hidden_states):
            try:
                return prefill_experts(experts, hidden_states, top_k_index, top_k_weights)
            except TritonError as error:
                refuse(error)
    if trains_lean(experts, hidden_states, top_k_weights):
        return train_experts(experts, hidden_states, top_k_index, top_k_weights)
    transformers_own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return transformers_own(experts, hidden_states, top_k_index, top_k_weights)


EXPERTS = ExpertsInterface()
EXPERTS["grouped_mm"] = grouped_experts
