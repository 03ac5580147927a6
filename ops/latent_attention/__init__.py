"""Attention over the latents of MLA, in blocks of keys, without positions.

One latent row per token serves all heads, as key and as value. Two forms give the same result:

- absorbed: each head's key matrix moves into the query and its value matrix behind the sum, so that
  all heads attend to the latent rows themselves (multi-query attention, R wide). Nothing is
  expanded, and a decoding step reads each latent once;
- expanded: keys and values of one block of tokens at a time are made from its latents. On a GPU
  cuDNN or flash attention takes the blocks.

Products per query token, key token and head: absorbed 2 L + P; expanded N + P + V, and once per
key token L (N + V). `absorbed_is_cheaper` counts them: with the 48B model's sizes the absorbed form
wins up to about 170 query tokens a call.

Both go through the keys block by block and merge partial results by their log-sum-exp, so that
memory beyond inputs and outputs does not grow with the context.

Shapes: B batch, T query tokens, S key tokens (the last T are the queries' own), H heads, N key size
without the shared part, P shared key part, K = N + P, V value size, L latent rank, R = L + P.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.latent_attention.absorbed import (
    absorbed_attention,
    absorbed_query,
    head_values,
)
from kimi_linear.ops.latent_attention.blocks import num_tokens, unseen_mask
from kimi_linear.ops.latent_attention.expanded import expanded_attention
from kimi_linear.ops.runtime import no_autocast


def absorbed_is_cheaper(
    num_queries: int, num_keys: int, *, key_dim: int, shared_dim: int, value_dim: int, rank: int
) -> bool:
    """Whether the absorbed form takes fewer products per head than the expanded one.

    Args:
        num_queries, num_keys: T and S.
        key_dim, shared_dim, value_dim, rank: N, P, V and L.
    """
    absorbed = num_queries * (num_keys * (2 * rank + shared_dim) + rank * (key_dim + value_dim))
    expanded = num_keys * (
        num_queries * (key_dim + shared_dim + value_dim) + rank * (key_dim + value_dim)
    )
    return absorbed <= expanded


def latent_attention(
    query_BTHK: Tensor,
    segments: Sequence[Tensor],
    key_HNL: Tensor,
    value_HVL: Tensor,
    *,
    scaling: float,
    real_BS: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T tokens to all S tokens, by the cheaper form.

    Args:
        query_BTHK: queries; the last P of K meet the shared key part.
        segments: latents in order, [B or 1, tokens, R] each, S tokens in all, on any device; one
            with a single row serves all rows.
        key_HNL, value_HVL: the halves of kv_b_proj.
        scaling: factor of the scores.
        real_BS: bool, False at padding, which nothing attends to; None if all are real.

    Returns:
        [B, T, H, V] in the query's dtype; zeros where a token attends to nothing.
    """
    (_, N, L), V = key_HNL.shape, value_HVL.shape[1]
    T, S = query_BTHK.shape[1], num_tokens(segments)
    cheaper = absorbed_is_cheaper(
        T, S, key_dim=N, shared_dim=query_BTHK.shape[-1] - N, value_dim=V, rank=L
    )
    attend = absorbed_attention if cheaper else expanded_attention
    dtype = query_BTHK.dtype
    with no_autocast(query_BTHK.device):
        return attend(
            query_BTHK, segments, key_HNL.to(dtype), value_HVL.to(dtype), scaling, real_BS
        )


def latent_attention_weights(
    query_BTHK: Tensor,
    segments: Sequence[Tensor],
    key_HNL: Tensor,
    value_HVL: Tensor,
    *,
    scaling: float,
    real_BS: Tensor | None = None,
    seen_BTS: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The absorbed form in one piece: [B, T, H, V], and the weights [B, H, T, S] of the heads.

    Args are those of `latent_attention`; `seen_BTS` (bool), where it is given, says in place of
    their order which latents each token attends to; `dropout` is the probability of a weight to be
    dropped.
    """
    B, T, H, _ = query_BTHK.shape
    rank = key_HNL.shape[2]
    key_HNL, value_HVL = key_HNL.to(query_BTHK.dtype), value_HVL.to(query_BTHK.dtype)
    latent = torch.cat([segment.expand(B, -1, -1) for segment in segments], dim=1)
    latent = latent.to(query_BTHK.device)
    query = absorbed_query(query_BTHK, key_HNL).transpose(1, 2)  # [B, H, T, R]
    scores = query @ latent.to(query.dtype).unsqueeze(1).transpose(2, 3) * scaling
    S = latent.shape[1]
    if seen_BTS is not None:
        unseen: Tensor | None = ~seen_BTS[:, :, None]
    else:
        unseen = unseen_mask(range(0, S), range(S - T, S), real_BS, latent.device)
    if unseen is not None:
        scores = scores.masked_fill(unseen.transpose(1, 2), torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=dropout > 0)
    mixed = weights @ latent[..., :rank].to(query.dtype).unsqueeze(1)  # [B, H, T, L]
    return head_values(mixed.transpose(1, 2), value_HVL, query_BTHK.dtype), weights
