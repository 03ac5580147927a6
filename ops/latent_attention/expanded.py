"""The expanded form of MLA: keys and values of a block of tokens at a time, made from its latents.

Where they can, fused kernels that return the log-sum-exp take the blocks. On a CPU that is torch's.
On CUDA it is cuDNN's, which takes keys wider than values (on an H200 630 TFLOP/s in bfloat16 with
192 and 128, where flash attention on padded values reaches 230), and flash attention where cuDNN
has nothing that fits. `torch.backends.cuda.enable_cudnn_sdp(False)` turns cuDNN off.

Shapes: B batch, T query tokens, S key tokens (the last T are the queries' own), H heads, N key size
without the shared part, P shared key part, K = N + P, V value size, L latent rank, R = L + P,
n tokens of a block.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.latent_attention.blocks import (
    MergedBlocks,
    block_softmax,
    key_blocks,
    num_tokens,
    query_tiles,
    unseen_mask,
    wide_bmm,
)
from kimi_linear.ops.latent_attention.cudnn import cudnn_attention
from kimi_linear.ops.runtime import needs_grad, power_of_two

# Tokens of a block of queries or keys, and where a fused kernel takes it.
EXPANDED_TOKENS = 1024
FUSED_QUERY_TOKENS = 65536
FUSED_EXPANDED_TOKENS = 65536
# A block has at most so many keys for each query: few queries need not as much memory for keys, and
# merging one more partial result of theirs takes 2 % of the time of four such keys a query.
FUSED_KEYS_PER_QUERY, FUSED_FEWEST_KEYS = 4, 16384
FUSED_MAX_HEAD_DIM = 256
FUSED_DTYPES = (torch.float16, torch.bfloat16)  # on CUDA; a CPU's kernel takes float32 and 64 too


def expanded_attention(
    query_BTHK: Tensor,
    segments: Sequence[Tensor],
    key_HNL: Tensor,
    value_HVL: Tensor,
    scaling: float,
    real_BS: Tensor | None,
) -> Tensor:
    """`latent_attention` by blocks of keys, each expanded once for all queries behind it."""
    if query_BTHK.is_cuda and real_BS is None:
        if _can_fuse(query_BTHK, value_HVL.shape[1], *segments, key_HNL, value_HVL):
            return _by_queries(query_BTHK, segments, key_HNL, value_HVL, scaling)
    B, T = query_BTHK.shape[:2]
    query = query_BTHK.transpose(1, 2)  # [B, H, T, K]
    past = num_tokens(segments) - T
    tiles = query_tiles(segments, EXPANDED_TOKENS, past)
    merged = [MergedBlocks() for _ in tiles]
    cuts = [tile.start for tile in tiles]
    for keys, latent in key_blocks(segments, EXPANDED_TOKENS, past + T, cuts):
        latent = latent.to(query.device, non_blocking=True).to(query.dtype)
        key, value = _expand(latent, key_HNL, value_HVL)
        key, value = key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1)
        real = None if real_BS is None else real_BS[:, keys.start : keys.stop]
        for tile, partial in zip(tiles, merged, strict=True):
            if keys.start < tile.stop:
                part = query[:, :, tile.start - past : tile.stop - past]
                partial.add(*_block(part, key, value, scaling, keys == tile, real))
    out = torch.cat([partial.result() for partial in merged], dim=2)
    return out.transpose(1, 2).to(query_BTHK.dtype)


def _by_queries(
    query_BTHK: Tensor,
    segments: Sequence[Tensor],
    key_HNL: Tensor,
    value_HVL: Tensor,
    scaling: float,
) -> Tensor:
    """`expanded_attention` by fused kernels: queries outside, keys inside, so that one partial
    result is held. Keys are expanded again for every `FUSED_QUERY_TOKENS` queries, which costs
    them 1 %."""
    B, T = query_BTHK.shape[:2]
    query = query_BTHK.transpose(1, 2)  # [B, H, T, K]
    past = num_tokens(segments) - T
    size = max(EXPANDED_TOKENS, FUSED_EXPANDED_TOKENS // B)
    tile_size = min(size, max(EXPANDED_TOKENS, FUSED_QUERY_TOKENS // B))
    size = keys_of_block(T, size)
    wide_key = _wide_key(key_HNL, query.shape[-1] - key_HNL.shape[1])
    outputs = []
    for tile in query_tiles(segments, tile_size, past):
        part, merged = query[:, :, tile.start - past : tile.stop - past], MergedBlocks()
        for keys, latent in key_blocks(segments, size, tile.stop, (tile.start,)):
            latent = latent.to(query.device, non_blocking=True).to(query.dtype)
            key, value = _expand_wide(latent, wide_key, value_HVL)
            key, value = key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1)
            out, lse = _fused_on_cuda(part, key, value, scaling, keys == tile)
            del key, value  # gigabytes, which merging can do without
            merged.add(out, lse)
            del out
        outputs.append(merged.result().transpose(1, 2).to(query_BTHK.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def keys_of_block(num_queries: int, most: int) -> int:
    """Keys, at most `most`, that are expanded at once for so many queries, a tile of them if there
    are more: a power of two, so that most calls share cuDNN's plans."""
    return min(most, max(FUSED_FEWEST_KEYS, power_of_two(FUSED_KEYS_PER_QUERY * num_queries)))


def _expand(latent_BnR: Tensor, key_HNL: Tensor, value_HVL: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, H, n, K] and values [B, H, n, V] of one block."""
    H, _, rank = key_HNL.shape
    latent, shared = latent_BnR[..., :rank], latent_BnR[..., rank:]
    key = torch.einsum("bsl,hnl->bhsn", latent, key_HNL)
    value = torch.einsum("bsl,hvl->bhsv", latent, value_HVL)
    return torch.cat([key, shared.unsqueeze(1).expand(-1, H, -1, -1)], dim=-1), value


def _wide_key(key_HNL: Tensor, shared_dim: int) -> Tensor:
    """[H * K, R]: the key matrices, and ones that hand the shared part on: keys in one product."""
    H, N, L = key_HNL.shape
    wide = key_HNL.new_zeros(H, N + shared_dim, L + shared_dim)
    wide[:, :N, :L] = key_HNL
    wide[:, N:, L:] = torch.eye(shared_dim, dtype=wide.dtype, device=wide.device)
    return wide.flatten(0, 1)


def _expand_wide(latent_BnR: Tensor, wide_key: Tensor, value_HVL: Tensor) -> tuple[Tensor, Tensor]:
    """`_expand` without copies; in memory tokens lie outside heads."""
    H, V, rank = value_HVL.shape
    key = F.linear(latent_BnR, wide_key).unflatten(-1, (H, -1))
    value = F.linear(latent_BnR[..., :rank], value_HVL.reshape(H * V, rank)).unflatten(-1, (H, V))
    return key.transpose(1, 2), value.transpose(1, 2)


def _block(
    query: Tensor,  # [B, H, T, K]
    key: Tensor,  # [B, H, n, K]
    value: Tensor,  # [B, H, n, V]
    scaling: float,
    is_causal: bool,
    real_Bn: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, H, T, V] and log-sum-exp [B, H, T] of one block, both wide."""
    if real_Bn is not None and bool(real_Bn.all()):
        real_Bn = None
    if _can_fuse(query, value.shape[-1], key, value):
        if query.is_cuda and real_Bn is None:
            out, lse = _fused_on_cuda(query, key, value, scaling, is_causal)
            return out.to(torch.promote_types(out.dtype, torch.float32)), lse
        if not query.is_cuda and not (is_causal and real_Bn is not None):
            return _fused_on_cpu(query, key, value, scaling, is_causal, real_Bn)
    n, T = key.shape[2], query.shape[2]
    places = range(T) if is_causal else range(n, n + T)
    unseen = unseen_mask(range(n), places, real_Bn, query.device)
    scores = wide_bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)) * scaling
    scores = scores.unflatten(0, query.shape[:2])
    weights, total, lse = block_softmax(scores, None if unseen is None else unseen.transpose(1, 2))
    out = wide_bmm(weights.to(value.dtype).flatten(0, 1), value.flatten(0, 1))
    return out.unflatten(0, query.shape[:2]) / total, lse


# ----------------------------------------------------------------------------------- fused kernels
def _can_fuse(query: Tensor, value_dim: int, *others: Tensor) -> bool:
    """Whether there is a kernel for such queries [.., K]; none of them records a graph."""
    if max(query.shape[-1], value_dim) > FUSED_MAX_HEAD_DIM or needs_grad(query, *others):
        return False
    return query.device.type == "cpu" or (query.is_cuda and query.dtype in FUSED_DTYPES)


def _fused_on_cpu(
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


def _fused_on_cuda(
    query: Tensor,  # [B, H, T, K]
    key: Tensor,  # [B, H, n, K]
    value: Tensor,  # [B, H, n, V]
    scaling: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, V] in the query's dtype and log-sum-exp [B, H, T] of one block, by cuDNN or
    flash attention."""
    found = cudnn_attention(query, key, value, scaling, is_causal)
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
