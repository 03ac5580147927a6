"""Routed experts where no graph is recorded: in pieces of tokens, so that memory does not grow with
their number, by kernels with all that stands around the products inside.

Sums are in the order of the slots: results do not change from run to run.

Shapes: T tokens, D hidden size, k experts of one token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from kimi_linear.ops.experts.packed import can_prefill_packed, packed_products
from kimi_linear.ops.experts.prefill_kernels import TensorDescriptor, down, gate_up
from kimi_linear.ops.experts.row_sums import weighted_sum
from kimi_linear.ops.experts.sort import sort_pairs
from kimi_linear.ops.runtime import has_kernels, in_pieces, is_plain_silu

logger = logging.get_logger(__name__)

# Tokens of a piece: 55 KB each at the 48B model's sizes, and every expert has its 1,024.
PIECE_TOKENS = 32768
DTYPES = (torch.float16, torch.bfloat16)

_refused: list[Exception] = []  # why the kernels cannot be compiled here


def refuse(error: Exception) -> None:
    """Do without the kernels from now on."""
    _refused.append(error)
    logger.warning_once(f"the experts' kernels cannot be used, grouped_mm is: {error}")


def can_prefill(experts: Any, x: Tensor) -> bool:
    """Whether `prefill_experts` takes these experts and this input: packed ones, and plain ones on
    Hopper and later, which copy the matrices' tiles by hardware."""
    matrices = experts.gate_up_proj, experts.down_proj
    if not has_kernels(x, *matrices) or experts.training or _refused:
        return False
    if not is_plain_silu(experts.act_fn) or x.dtype not in DTYPES:
        return False
    if x.shape[1] % 8 or matrices[1].shape[2] % 8:
        return False
    return can_prefill_packed(matrices, x) or bool(
        TensorDescriptor is not None
        and all(type(m) in (nn.Parameter, Tensor) and m.is_contiguous() for m in matrices)
        and all(matrix.dtype == x.dtype for matrix in matrices)
        and torch.cuda.get_device_capability(x.device)[0] >= 9
    )


def prefill_experts(experts: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """[T, D], experts and weights [T, k] to [T, D]."""
    matrices = experts.gate_up_proj, experts.down_proj
    num_experts, is_packed = matrices[0].shape[0], can_prefill_packed(matrices, x)

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        x = x.contiguous()
        pairs = sort_pairs(index, num_experts)
        if is_packed:
            rows = packed_products(x, pairs, matrices)
        else:
            inner = gate_up(x, pairs.order, pairs.ends, matrices[0], index.shape[1])
            rows = down(inner, pairs.order, pairs.ends, matrices[1])
        return weighted_sum(rows, weights.contiguous(), index.contiguous(), num_experts)

    return in_pieces(run, PIECE_TOKENS, x, index, weights)
