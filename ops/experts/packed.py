"""Packed experts of many tokens, where no graph is recorded.

With few rows by expert, reading the weights is what takes time: words are taken apart inside the
products. With many, the products are, and Hopper's kernels for plain weights are faster: some
experts at a time are written out in full for them. Where activations are quantised too, neither is
done (`float8_kernels.py`).

Shapes: T tokens, D hidden size, I expert width, E experts, k experts of one token, P = T * k pairs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kimi_linear.ops.experts.float8_kernels import down as float8_down
from kimi_linear.ops.experts.float8_kernels import gate_up as float8_gate_up
from kimi_linear.ops.experts.packed_kernels import down, gate_up
from kimi_linear.ops.experts.prefill_kernels import TensorDescriptor
from kimi_linear.ops.experts.prefill_kernels import down as plain_down
from kimi_linear.ops.experts.prefill_kernels import gate_up as plain_gate_up
from kimi_linear.ops.experts.sort import SortedPairs
from kimi_linear.ops.packed.float8 import quantize_rows, takes_float8
from kimi_linear.ops.packed.unpacking import can_unpack
from kimi_linear.ops.packed.weights import PackedWeights

# Tokens from which products of quantised activations are faster (H200).
FLOAT8_TOKENS = 256
# Rows by expert from which experts are written out.
MANY_ROWS = 320
# Bytes that are written out at once.
UNPACKED_BYTES = 512 << 20


def can_prefill_packed(matrices: tuple[Tensor, Tensor], x: Tensor) -> bool:
    """Whether the kernels take these experts and this input."""
    return all(
        isinstance(each, PackedWeights) and can_unpack(each) and each.dtype == x.dtype
        for each in matrices
    )


def packed_products(x: Tensor, pairs: SortedPairs, matrices: tuple[Any, Any]) -> Tensor:
    """[P, D], in the pairs' order: both products of each pair's expert.

    Args:
        x: [T, D].
        pairs: By expert.
        matrices: gate_up [E, 2 I, D] and down [E, D, I], packed.
    """
    first, second = matrices
    order, ends, k = pairs.order, pairs.ends, pairs.places.shape[1]
    if x.shape[0] >= FLOAT8_TOKENS and all(map(takes_float8, matrices)):
        rows = float8_gate_up(quantize_rows(x, pairs.places), ends, first)
        return float8_down(rows, order, ends, second, x.dtype)
    if order.numel() < MANY_ROWS * first.shape[0] or not _has_tiles(x):
        return down(gate_up(x, order, ends, first, k), order, ends, second)
    inner = x.new_empty(order.numel(), first.shape[1] // 2)
    _by_experts(first, lambda w, e: plain_gate_up(x, order, ends, w, k, e, inner))
    out = x.new_empty(order.numel(), second.shape[1])
    _by_experts(second, lambda w, e: plain_down(inner, order, ends, w, e, out))
    return out


def _has_tiles(x: Tensor) -> bool:
    """Whether hardware copies tiles of plain weights."""
    return TensorDescriptor is not None and torch.cuda.get_device_capability(x.device)[0] >= 9


def _by_experts(weights: Any, product: Callable[[Tensor, int], Any]) -> None:
    """Write some experts' weights out at a time, and multiply by them."""
    num_experts = weights.shape[0]
    size = weights[0].numel() * weights.element_size()
    step = max(1, UNPACKED_BYTES // size)
    for start in range(0, num_experts, step):
        product(weights[start : start + step].dequantized(), start)
