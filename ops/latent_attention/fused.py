"""Fused kernels that return the log-sum-exp beside the output: torch's for CPUs, cuDNN's, flash's.

cuDNN takes keys wider than values (on an H200 630 TFLOP/s in bfloat16 with 192 and 128, where flash
attention on padded values reaches 230). Flash attention is used where cuDNN has nothing that fits.
`torch.backends.cuda.enable_cudnn_sdp(False)` turns cuDNN off.

Shapes: B batch, T query tokens, H heads, K key size, V value size, n tokens of a block of keys.
"""

import torch
import torch.nn.functional as F
from kimi_linear.ops.runtime import needs_grad
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

MAX_HEAD_DIM = 256
CUDA_DTYPES = (torch.float16, torch.bfloat16)  # a CPU's kernel takes float32 and 64 too
# cuDNN makes a plan for every new shape, in 40 ms. Pairs of a query and a key token from which it
# is worth its plan, and what tokens that attend to each other are padded to, to share plans.
CUDNN_PAIRS, CUDNN_OWN_PAIRS = 1 << 26, 1 << 24
CUDNN_OWN_MULTIPLE = 512
_without_cudnn: set[tuple[int, int]] = set()  # sizes of keys and values that it refused


def can_fuse(query: Tensor, value_dim: int, *others: Tensor) -> bool:
    """Whether there is a kernel for such queries [.., K]; none of them records a graph."""
    if max(query.shape[-1], value_dim) > MAX_HEAD_DIM or needs_grad(query, *others):
        return False
    return query.device.type == "cpu" or (query.is_cuda and query.dtype in CUDA_DTYPES)


def fused_on_cpu(
    query: Tensor,  # [B, H, T, K]
    key: Tensor,  # [B, H, n, K]
    value: Tensor,  # [B, H, n, V]
    scaling: float,
    is_causal: bool,
    real_Bn: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, V] and log-sum-exp [B, H, T] of one block, both wide.

    `real_Bn` is False at padding, None if all are real; not together with `is_causal`.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    bias = None
    if real_Bn is not None:
        bias = torch.zeros_like(real_Bn, dtype=query.dtype)
        bias = bias.masked_fill(~real_Bn, float("-inf"))[:, None, None]
        bias = bias.expand(-1, 1, query.shape[2], -1)
    padded = _of_one_size(query, key, value)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *padded, 0.0, is_causal, attn_mask=bias, scale=scaling
    )
    if real_Bn is not None:  # the kernel says 0 where there is nothing to attend to
        lse = lse.masked_fill(~real_Bn.any(dim=1)[:, None, None], float("-inf"))
    return out[..., : value.shape[-1]].to(wide), lse.to(wide)


def fused_on_cuda(
    query: Tensor,  # [B, H, T, K]
    key: Tensor,  # [B, H, n, K]
    value: Tensor,  # [B, H, n, V]
    scaling: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, V] in the query's dtype and log-sum-exp [B, H, T] of one block, by cuDNN or
    flash attention."""
    found = _cudnn(query, key, value, scaling, is_causal)
    if found is not None:
        return found
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        *_of_one_size(query, key, value), 0.0, is_causal, False, scale=scaling
    )[:2]
    return out[..., : value.shape[-1]], lse


def _of_one_size(*heads: Tensor) -> list[Tensor]:
    """Padded to one head size, a multiple of 8, as flash attention wants them."""
    size = -(-max(x.shape[-1] for x in heads) // 8) * 8
    return [F.pad(x, (0, size - x.shape[-1])) for x in heads]


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool
) -> tuple[Tensor, Tensor] | None:
    """`fused_on_cuda` by cuDNN; None where it is not worth a plan, or has none."""
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


__all__ = ["can_fuse", "fused_on_cpu", "fused_on_cuda"]
