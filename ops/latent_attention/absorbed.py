"""The absorbed form of MLA: all heads attend to the latent rows themselves.

Shapes: B batch, T query tokens, S key tokens (the last T are the queries' own), H heads, N key size
without the shared part, P shared key part, K = N + P, V value size, L latent rank, R = L + P,
n tokens of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kimi_linear.ops.latent_attention.blocks import (
    MergedBlocks,
    block_softmax,
    key_blocks,
    num_tokens,
    unseen_mask,
    wide_bmm,
)

# Elements of one tensor of scores: it fits a CPU's caches, and fills an accelerator.
SCORE_ELEMENTS = {"cpu": 1 << 20}
SCORE_ELEMENTS_ELSEWHERE = 1 << 27
MIN_BLOCK_TOKENS = 256


def absorbed_attention(
    query_BTHK: Tensor,
    segments: Sequence[Tensor],
    key_HNL: Tensor,
    value_HVL: Tensor,
    scaling: float,
    real_BS: Tensor | None,
) -> Tensor:
    """`latent_attention` by tiles of queries and blocks of latents."""
    B, T, H, _ = query_BTHK.shape
    query = absorbed_query(query_BTHK, key_HNL) * scaling
    limit = SCORE_ELEMENTS.get(query.device.type, SCORE_ELEMENTS_ELSEWHERE)
    step = max(1, min(T, limit // (B * H * MIN_BLOCK_TOKENS)))
    size = max(MIN_BLOCK_TOKENS, limit // (B * H * step))
    past = num_tokens(segments) - T
    outputs = []
    for first in range(0, T, step):
        tile = query[:, first : first + step]
        places = range(past + first, past + first + tile.shape[1])
        merged = MergedBlocks()
        for keys, latent in key_blocks(segments, size, places.stop):
            unseen = unseen_mask(keys, places, real_BS, query.device)
            merged.add(*_absorbed_block(tile, latent, unseen, key_HNL.shape[2]))
        outputs.append(head_values(merged.result(), value_HVL, query_BTHK.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _absorbed_block(
    query_BTHR: Tensor, latent_BnR: Tensor, unseen: Tensor | None, rank: int
) -> tuple[Tensor, Tensor]:
    """Mixed latents [B, T, H, L] and log-sum-exp [B, T, H] of one block, for a scaled query."""
    B, T, H, R = query_BTHR.shape
    rows = latent_BnR.shape[0]
    latent = latent_BnR.to(query_BTHR.device, non_blocking=True).to(query_BTHR.dtype)
    # a single row of latents serves all rows in one product
    query = query_BTHR.reshape(rows, B // rows * T * H, R)
    scores = wide_bmm(query, latent.transpose(1, 2)).view(B, T, H, -1)
    weights, total, lse = block_softmax(scores, unseen)
    weights = weights.to(latent.dtype).view(rows, B // rows * T * H, -1)
    mixed = wide_bmm(weights, latent[..., :rank]).view(B, T, H, rank)
    return mixed / total, lse


def absorbed_query(query_BTHK: Tensor, key_HNL: Tensor) -> Tensor:
    """[B, T, H, R]: the query in the latent's coordinates."""
    inner, shared = query_BTHK.split(
        [key_HNL.shape[1], query_BTHK.shape[-1] - key_HNL.shape[1]], -1
    )
    return torch.cat([torch.einsum("bthn,hnl->bthl", inner, key_HNL), shared], dim=-1)


def head_values(mixed_BTHL: Tensor, value_HVL: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H, V]: the heads' value matrices applied to the mixed latents."""
    return torch.einsum("bthl,hvl->bthv", mixed_BTHL.to(value_HVL.dtype), value_HVL).to(dtype)
