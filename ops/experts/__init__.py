"""Routed experts of many tokens: Transformers' "grouped_mm", and a leaner form of it.

Both sort the pairs of a token and one of its experts by expert and multiply each expert's rows by
its matrices. Ours takes over where no graph is recorded: it goes through the tokens in pieces, so
that memory does not grow with their number, and what stands around the products is inside their
kernels (`grouped_kernels.py`). Sums are in the order of the slots: results do not change from run
to run. Training keeps less for its backward pass (`experts_training.py`). Any other experts
implementation than "grouped_mm" turns both off.

Shapes: T tokens, D hidden size, I expert width, E experts, k experts of one token, P = T * k pairs.
"""

from typing import Any

import torch
from kimi_linear.ops.experts.grouped_kernels import TensorDescriptor, TritonError, down, gate_up
from kimi_linear.ops.experts.pair_sort import sort_pairs
from kimi_linear.ops.experts.prefill_kernels import weighted_sum
from kimi_linear.ops.experts.training import train_experts, trains_lean
from kimi_linear.ops.runtime import has_kernels, is_plain_silu
from kimi_linear.upstream.interfaces import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from torch import Tensor, nn
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Tokens of a piece: 55 KB each at the 48B model's sizes, and every expert has its 1,024.
PIECE_TOKENS = 32768
DTYPES = (torch.float16, torch.bfloat16)


def grouped_experts(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """[T, D], experts and weights [T, k] to [T, D].

    An expert's number of E or more is another rank's: it adds nothing.
    """
    if is_lean(experts, hidden_states):
        try:
            return _in_pieces(experts, hidden_states, top_k_index, top_k_weights)
        except TritonError as error:
            _refused.append(error)
            logger.warning_once(f"the experts' kernels cannot be used, grouped_mm is: {error}")
    if trains_lean(experts, hidden_states, top_k_weights):
        return train_experts(experts, hidden_states, top_k_index, top_k_weights)
    transformers_own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    return transformers_own(experts, hidden_states, top_k_index, top_k_weights)


_refused: list[Exception] = []  # why the kernels cannot be compiled here


def is_lean(experts: Any, x: Tensor) -> bool:
    """Whether our form takes these experts and this input: on Hopper and later, which copy the
    matrices' tiles by hardware."""
    matrices = experts.gate_up_proj, experts.down_proj
    return bool(
        has_kernels(x, *matrices)
        and not experts.training
        and not _refused
        and TensorDescriptor is not None
        and all(type(m) in (nn.Parameter, Tensor) and m.is_contiguous() for m in matrices)
        and all(matrix.dtype == x.dtype for matrix in matrices)
        and x.dtype in DTYPES
        and x.shape[1] % 8 == matrices[1].shape[2] % 8 == 0
        and is_plain_silu(experts.act_fn)
        and torch.cuda.get_device_capability(x.device)[0] >= 9
    )


def _in_pieces(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if x.shape[0] <= PIECE_TOKENS:
        return _one_piece(experts, x, index, weights)
    out = torch.empty_like(x)
    for start in range(0, x.shape[0], PIECE_TOKENS):
        piece = slice(start, start + PIECE_TOKENS)
        out[piece] = _one_piece(experts, x[piece], index[piece], weights[piece])
    return out


def _one_piece(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    num_experts, num_chosen = experts.gate_up_proj.shape[0], index.shape[1]
    x, weights = x.contiguous(), weights.contiguous()
    order, ends, *_ = sort_pairs(index, num_experts)
    inner = gate_up(x, order, ends, experts.gate_up_proj, num_chosen)
    pairs = down(inner, order, ends, experts.down_proj)
    return weighted_sum(pairs, weights, index.contiguous(), num_experts)


EXPERTS = ExpertsInterface()
EXPERTS["grouped_mm"] = grouped_experts

__all__ = ["EXPERTS", "grouped_experts", "is_lean"]
