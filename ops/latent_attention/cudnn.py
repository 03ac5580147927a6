"""Attention by cuDNN, which takes keys wider than values, forward and backward.

Shapes: B batch, T query tokens, S key tokens, H heads, K key size, V value size.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# It makes a plan for every new shape, in 40 ms. Pairs of a query and a key token from which it is
# worth its plan, and what tokens that attend to each other are padded to, to share plans.
CUDNN_PAIRS, CUDNN_OWN_PAIRS = 1 << 26, 1 << 24
CUDNN_OWN_MULTIPLE = 512
DTYPES = (torch.float16, torch.bfloat16)
_without_cudnn: set[tuple[int, int]] = set()  # sizes of keys and values that it refused


def cudnn_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool
) -> tuple[Tensor, Tensor] | None:
    """`_fused_on_cuda` by cuDNN; None where it is not worth a plan, or has none."""
    B, H, T, K = query.shape
    pairs = B * T * key.shape[2]
    if (
        pairs < (CUDNN_OWN_PAIRS if is_causal else CUDNN_PAIRS)
        or K % 8 != 0
        or value.shape[-1] % 8 != 0
        or not torch.backends.cuda.cudnn_sdp_enabled()
        or (K, value.shape[-1]) in _without_cudnn
    ):
        return None
    if is_causal:  # nothing real sees what is padded behind it
        query, key, value = (_more_tokens(x, -T % CUDNN_OWN_MULTIPLE) for x in (query, key, value))
    try:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, is_causal, False, scale=scaling
        )[:2]
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _without_cudnn.add((K, value.shape[-1]))
        logger.warning_once(f"cuDNN has no attention for these heads, flash is used: {error}")
        return None
    return out[:, :, :T], lse.view(B, H, -1)[:, :, :T]


def _more_tokens(x_BHnK: Tensor, count: int) -> Tensor:
    """With zeros behind the tokens, which stay outside heads in memory."""
    if count == 0:
        return x_BHnK
    return F.pad(x_BHnK.transpose(1, 2), (0, 0, 0, 0, 0, count)).transpose(1, 2)


def trains_by_cudnn(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `cudnn_attention` can be asked for causal attention that has gradients: of tokens
    that all attend to each other, in a dtype and with heads that it has a backward pass for."""
    if not query.is_cuda or query.dtype not in DTYPES or query.shape[2] != key.shape[2]:
        return False
    return _has_backward(query.shape[-1], value.shape[-1], query.dtype, query.device)


@cache
def _has_backward(key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Found by trying, on a few tokens."""
    with torch.enable_grad():
        sizes = key_dim, key_dim, value_dim
        heads = [
            torch.zeros(1, 1, CUDNN_OWN_MULTIPLE, size, dtype=dtype, device=device)
            for size in sizes
        ]
        try:
            out = torch.ops.aten._scaled_dot_product_cudnn_attention(
                *(each.requires_grad_() for each in heads), None, True, 0.0, True, False
            )[0]
            torch.autograd.grad(out.sum(), heads)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            logger.warning_once(f"cuDNN does not train these heads, flash attention does: {error}")
            return False
    return True
