"""Attention to keys and values that are already expanded: eager, and sequence by sequence.

Shapes: B batch, T query tokens, S key tokens (the last T are the queries' own), H heads, K key
size, V value size.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from kimi_linear.ops.latent_attention.cudnn import cudnn_attention, trains_by_cudnn


def eager_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, T, K]
    key: Tensor,  # [B, H, S, K]
    value: Tensor,  # [B, H, S, V]
    attention_mask: Tensor | None,  # [B, 1, T, S], added to the scores
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention by plain matrix products: [B, T, H, V] and the weights [B, H, T, S]."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def attention_by_sequence(
    query_BTHK: Tensor,
    key_BHSK: Tensor,
    value_BHSV: Tensor,
    ends: Sequence[int],
    *,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention within each of the sequences that stand end to end in a packed row.

    Args:
        query_BTHK: queries, B = 1.
        key_BHSK, value_BHSV: keys and values. The first S - T belong to the first sequence and come
            before its queries.
        ends: [N + 1], where the queries of each sequence end, from 0 to T.
        scaling: factor of the scores.
        dropout: probability of dropping a weight.

    Returns:
        [1, T, H, V].
    """
    query, key, value = query_BTHK.transpose(1, 2), key_BHSK, value_BHSV
    sizes = [stop - start for start, stop in pairwise(ends)]
    lengths = [sizes[0] + key.shape[2] - query.shape[2], *sizes[1:]]
    parts = zip(query.split(sizes, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [_attention(*part, scaling, dropout) for part in parts if part[0].shape[2]]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
    """[B, H, T, V]: causal attention of the last T tokens to all S."""
    if not dropout and trains_by_cudnn(query, key, value):
        found = cudnn_attention(query, key, value, scaling, True)
        if found is not None:
            return found[0]
    value_dim = value.shape[-1]
    if value_dim < key.shape[-1]:  # flash attention wants one head size
        value = F.pad(value, (0, key.shape[-1] - value_dim))
    kernels: AbstractContextManager[Any] = nullcontext()
    if query.is_cuda:  # all but cuDNN, which would make a plan for each length
        kernels = sdpa_kernel(
            [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        )
    with kernels:
        out = F.scaled_dot_product_attention(
            query, key, value, **_causal(query, key), dropout_p=dropout, scale=scaling
        )
    return out[..., :value_dim]


def _causal(query_BHTK: Tensor, key_BHSK: Tensor) -> dict[str, Any]:
    """SDPA's arguments for causal attention of the last T tokens to all S."""
    T, S = query_BHTK.shape[2], key_BHSK.shape[2]
    return {"is_causal": True} if T == S else {"attn_mask": causal_lower_right(T, S)}
