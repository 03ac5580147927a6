"""The expanded form of MLA: keys and values of a block of tokens at a time, made from its latents.

Shapes: B batch, T query tokens, S key tokens (the last T are the queries' own), H heads, N key size
without the shared part, P shared key part, K = N + P, V value size, L latent rank, R = L + P,
n tokens of a block.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from kimi_linear.ops.latent_attention.blocks import (
    MergedBlocks,
    block_softmax,
    key_blocks,
    num_tokens,
    query_tiles,
    unseen_mask,
    wide_bmm,
)
from kimi_linear.ops.latent_attention.fused import can_fuse, fused_on_cpu, fused_on_cuda
from torch import Tensor

# Tokens of a block of queries or keys, and where a fused kernel takes it.
EXPANDED_TOKENS = 1024
FUSED_QUERY_TOKENS = 65536
FUSED_EXPANDED_TOKENS = 65536


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
        if can_fuse(query_BTHK, value_HVL.shape[1], *segments, key_HNL, value_HVL):
            return _by_queries(query_BTHK, segments, key_HNL, value_HVL, scaling)
    B, T = query_BTHK.shape[:2]
    query = query_BTHK.transpose(1, 2)  # [B, H, T, K]
    past = num_tokens(segments) - T
    tiles = query_tiles(segments, EXPANDED_TOKENS, past)
    merged = [MergedBlocks() for _ in tiles]
    cuts = [tile.start for tile in tiles]
    for keys, latent in key_blocks(segments, EXPANDED_TOKENS, past + T, query.device, cuts):
        key, value = _expand(latent.to(query.dtype), key_HNL, value_HVL)
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
    wide_key = _wide_key(key_HNL, query.shape[-1] - key_HNL.shape[1])
    outputs = []
    for tile in query_tiles(segments, tile_size, past):
        part, merged = query[:, :, tile.start - past : tile.stop - past], MergedBlocks()
        for keys, latent in key_blocks(segments, size, tile.stop, query.device, (tile.start,)):
            key, value = _expand_wide(latent.to(query.dtype), wide_key, value_HVL)
            key, value = key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1)
            out, lse = fused_on_cuda(part, key, value, scaling, keys == tile)
            del key, value  # gigabytes, which merging can do without
            merged.add(out, lse)
            del out
        outputs.append(merged.result().transpose(1, 2).to(query_BTHK.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


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
    if can_fuse(query, value.shape[-1], key, value):
        if query.is_cuda and real_Bn is None:
            out, lse = fused_on_cuda(query, key, value, scaling, is_causal)
            return out.to(torch.promote_types(out.dtype, torch.float32)), lse
        if not query.is_cuda and not (is_causal and real_Bn is not None):
            return fused_on_cpu(query, key, value, scaling, is_causal, real_Bn)
    n, T = key.shape[2], query.shape[2]
    places = range(T) if is_causal else range(n, n + T)
    unseen = unseen_mask(range(n), places, real_Bn, query.device)
    scores = wide_bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)) * scaling
    scores = scores.unflatten(0, query.shape[:2])
    weights, total, lse = block_softmax(scores, None if unseen is None else unseen.transpose(1, 2))
    out = wide_bmm(weights.to(value.dtype).flatten(0, 1), value.flatten(0, 1))
    return out.unflatten(0, query.shape[:2]) / total, lse


__all__ = ["FUSED_QUERY_TOKENS", "expanded_attention"]
