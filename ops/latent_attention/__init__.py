"""Attention over the latents of MLA, in blocks of keys, without positions.

One latent row per token serves all heads, as key and as value. Two forms give the same result:

- absorbed: each head's key matrix moves into the query and its value matrix behind the sum, so that
  all heads attend to the latent rows themselves (multi-query attention, R wide). Nothing is
  expanded, and a decoding step reads each latent once;
- expanded: keys and values of one block of tokens at a time are made from its latents.

Products per query token, key token and head: absorbed 2 L + P; expanded N + P + V, and once per
key token L (N + V). `absorbed_is_cheaper` counts them: with the 48B model's sizes the absorbed form
wins up to about 170 query tokens a call.

Both go through the keys block by block and merge partial results by their log-sum-exp, so that
memory beyond inputs and outputs does not grow with the context. On CUDA the blocks of the expanded
form go to cuDNN, which takes keys wider than values (on an H200 630 TFLOP/s in bfloat16 with 192
and 128, where flash attention on padded values reaches 230), and to flash attention where cuDNN has
nothing that fits. `torch.backends.cuda.enable_cudnn_sdp(False)` turns cuDNN off.

Shapes: B batch, T query tokens, S key tokens (the last T are the queries' own), H heads, N key size
without the shared part, P shared key part, K = N + P, V value size, L latent rank, R = L + P,
n tokens of a block.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from kimi_linear.ops.runtime import no_autocast
from torch import Tensor
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Elements of one tensor of scores: it fits a CPU's caches, and fills an accelerator.
SCORE_ELEMENTS = {"cpu": 1 << 20}
SCORE_ELEMENTS_ELSEWHERE = 1 << 27
# Tokens of a block of queries or keys in the expanded form, and where a fused kernel takes it.
EXPANDED_TOKENS = 1024
FUSED_QUERY_TOKENS = 65536
FUSED_EXPANDED_TOKENS = 65536
MIN_BLOCK_TOKENS = 256
FUSED_MAX_HEAD_DIM = 256
# cuDNN makes a plan for every new shape, in 40 ms. Pairs of a query and a key token from which it
# is worth its plan, and what tokens that attend to each other are padded to, to share plans.
CUDNN_PAIRS, CUDNN_OWN_PAIRS = 1 << 26, 1 << 24
CUDNN_OWN_MULTIPLE = 512
FUSED_DTYPES = (torch.float16, torch.bfloat16)  # on CUDA; a CPU's kernel takes float32 and 64 too


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
    T, S = query_BTHK.shape[1], sum(segment.shape[1] for segment in segments)
    cheaper = absorbed_is_cheaper(
        T, S, key_dim=N, shared_dim=query_BTHK.shape[-1] - N, value_dim=V, rank=L
    )
    attend = _absorbed if cheaper else _expanded
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
    query = _absorbed_query(query_BTHK, key_HNL).transpose(1, 2)  # [B, H, T, R]
    scores = query @ latent.to(query.dtype).unsqueeze(1).transpose(2, 3) * scaling
    S = latent.shape[1]
    if seen_BTS is not None:
        hidden: Tensor | None = ~seen_BTS[:, :, None]
    else:
        hidden = _hidden(range(0, S), range(S - T, S), real_BS, latent.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden.transpose(1, 2), torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=dropout > 0)
    mixed = weights @ latent[..., :rank].to(query.dtype).unsqueeze(1)  # [B, H, T, L]
    return _values(mixed.transpose(1, 2), value_HVL, query_BTHK.dtype), weights


# -------------------------------------------------------------------------------- the absorbed form
def _absorbed_query(query_BTHK: Tensor, key_HNL: Tensor) -> Tensor:
    """[B, T, H, R]: the query in the latent's coordinates."""
    inner, shared = query_BTHK.split(
        [key_HNL.shape[1], query_BTHK.shape[-1] - key_HNL.shape[1]], -1
    )
    return torch.cat([torch.einsum("bthn,hnl->bthl", inner, key_HNL), shared], dim=-1)


def _values(mixed_BTHL: Tensor, value_HVL: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H, V]: the heads' value matrices applied to the mixed latents."""
    return torch.einsum("bthl,hvl->bthv", mixed_BTHL.to(value_HVL.dtype), value_HVL).to(dtype)


def _absorbed(
    query_BTHK: Tensor,
    segments: Sequence[Tensor],
    key_HNL: Tensor,
    value_HVL: Tensor,
    scaling: float,
    real_BS: Tensor | None,
) -> Tensor:
    B, T, H, _ = query_BTHK.shape
    query = _absorbed_query(query_BTHK, key_HNL) * scaling
    limit = SCORE_ELEMENTS.get(query.device.type, SCORE_ELEMENTS_ELSEWHERE)
    step = max(1, min(T, limit // (B * H * MIN_BLOCK_TOKENS)))
    size = max(MIN_BLOCK_TOKENS, limit // (B * H * step))
    past = sum(segment.shape[1] for segment in segments) - T
    outputs = []
    for first in range(0, T, step):
        tile = query[:, first : first + step]
        places = range(past + first, past + first + tile.shape[1])
        merged = _Merged()
        for keys, latent in _blocks(segments, size, places.stop, query.device):
            hidden = _hidden(keys, places, real_BS, query.device)
            merged.add(*_absorbed_block(tile, latent, hidden, key_HNL.shape[2]))
        outputs.append(_values(merged.result(), value_HVL, query_BTHK.dtype))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _absorbed_block(
    query_BTHR: Tensor, latent_BnR: Tensor, hidden: Tensor | None, rank: int
) -> tuple[Tensor, Tensor]:
    """Mixed latents [B, T, H, L] and log-sum-exp [B, T, H] of one block, for a scaled query."""
    B, T, H, R = query_BTHR.shape
    rows = latent_BnR.shape[0]
    latent = latent_BnR.to(query_BTHR.dtype)
    # a single row of latents serves all rows in one product
    query = query_BTHR.reshape(rows, B // rows * T * H, R)
    scores = _wide_bmm(query, latent.transpose(1, 2)).view(B, T, H, -1)
    weights, total, lse = _softmax(scores, hidden)
    weights = weights.to(latent.dtype).view(rows, B // rows * T * H, -1)
    mixed = _wide_bmm(weights, latent[..., :rank]).view(B, T, H, rank)
    return mixed / total, lse


# -------------------------------------------------------------------------------- the expanded form
def _expanded(
    query_BTHK: Tensor,
    segments: Sequence[Tensor],
    key_HNL: Tensor,
    value_HVL: Tensor,
    scaling: float,
    real_BS: Tensor | None,
) -> Tensor:
    B, T, H, _ = query_BTHK.shape
    is_fused = (
        query_BTHK.is_cuda
        and real_BS is None
        and query_BTHK.dtype in FUSED_DTYPES
        and max(query_BTHK.shape[-1], value_HVL.shape[1]) <= FUSED_MAX_HEAD_DIM
        and not _records(query_BTHK, *segments, key_HNL, value_HVL)
    )
    if is_fused:
        return _expanded_by_queries(query_BTHK, segments, key_HNL, value_HVL, scaling)
    query = query_BTHK.transpose(1, 2)  # [B, H, T, K]
    size = EXPANDED_TOKENS
    past = sum(segment.shape[1] for segment in segments) - T
    tiles = _tiles(segments, size, past)
    merged = [_Merged() for _ in tiles]
    cuts = [tile.start for tile in tiles]
    for keys, latent in _blocks(segments, size, past + T, query.device, cuts):
        key, value = _expand(latent.to(query.dtype), key_HNL, value_HVL)
        key, value = key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1)
        real = None if real_BS is None else real_BS[:, keys.start : keys.stop]
        for tile, partial in zip(tiles, merged, strict=True):
            if keys.start < tile.stop:
                part = query[:, :, tile.start - past : tile.stop - past]
                partial.add(*_expanded_block(part, key, value, scaling, keys == tile, real))
    out = torch.cat([partial.result() for partial in merged], dim=2)
    return out.transpose(1, 2).to(query_BTHK.dtype)


def _expanded_by_queries(
    query_BTHK: Tensor,
    segments: Sequence[Tensor],
    key_HNL: Tensor,
    value_HVL: Tensor,
    scaling: float,
) -> Tensor:
    """The same for fused kernels: queries outside, keys inside, so that one partial result is held.

    Keys are expanded again for every `FUSED_QUERY_TOKENS` queries, which costs them 1 %.
    """
    B, T = query_BTHK.shape[:2]
    query = query_BTHK.transpose(1, 2)  # [B, H, T, K]
    past = sum(segment.shape[1] for segment in segments) - T
    size = max(EXPANDED_TOKENS, FUSED_EXPANDED_TOKENS // B)
    wide_key = _wide_key(key_HNL, query.shape[-1] - key_HNL.shape[1])
    outputs = []
    for tile in _tiles(segments, min(size, max(EXPANDED_TOKENS, FUSED_QUERY_TOKENS // B)), past):
        part, merged = query[:, :, tile.start - past : tile.stop - past], _Merged()
        cuts = (tile.start,)
        for keys, latent in _blocks(segments, size, tile.stop, query.device, cuts):
            is_causal = keys == tile
            key, value = _expand_wide(latent.to(query.dtype), wide_key, value_HVL)
            key, value = key.expand(B, -1, -1, -1), value.expand(B, -1, -1, -1)
            out, lse = _fused_on_cuda(part, key, value, scaling, is_causal)
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


def _expanded_block(
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
    fused = _fused(query, key, value, scaling, is_causal, real_Bn)
    if fused is not None:
        return fused
    n, T = key.shape[2], query.shape[2]
    keys, places = range(n), range(T) if is_causal else range(n, n + T)
    hidden = _hidden(keys, places, real_Bn, query.device)
    scores = _wide_bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)) * scaling
    scores = scores.unflatten(0, query.shape[:2])
    weights, total, lse = _softmax(scores, None if hidden is None else hidden.transpose(1, 2))
    out = _wide_bmm(weights.to(value.dtype).flatten(0, 1), value.flatten(0, 1))
    return out.unflatten(0, query.shape[:2]) / total, lse


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    is_causal: bool,
    real_Bn: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """`_expanded_block` by torch's fused kernel; None where it has none that fits."""
    device = query.device.type
    wide = torch.promote_types(query.dtype, torch.float32)
    size = max(query.shape[-1], value.shape[-1])
    if _records(query, key, value) or size > FUSED_MAX_HEAD_DIM:
        return None
    if device == "cuda" and real_Bn is None and query.dtype in FUSED_DTYPES:
        out, lse = _fused_on_cuda(query, key, value, scaling, is_causal)
        return out.to(wide), lse
    if device != "cpu" or (is_causal and real_Bn is not None):
        return None
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


def _of_one_size(*heads: Tensor) -> list[Tensor]:
    """Padded to one head size, a multiple of 8, as flash attention wants them."""
    size = -(-max(x.shape[-1] for x in heads) // 8) * 8
    return [F.pad(x, (0, size - x.shape[-1])) for x in heads]


def _fused_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """`_expanded_block` by cuDNN, or flash attention; the output is in the query's dtype."""
    found = _cudnn(query, key, value, scaling, is_causal)
    if found is not None:
        return found
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        *_of_one_size(query, key, value), 0.0, is_causal, False, scale=scaling
    )[:2]
    return out[..., : value.shape[-1]], lse


def _cudnn(
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
    """Zeros behind the tokens, which stay outside heads in memory."""
    return (
        F.pad(x_BHnK.transpose(1, 2), (0, 0, 0, 0, 0, count)).transpose(1, 2) if count else x_BHnK
    )


_without_cudnn: set[tuple[int, int]] = set()  # sizes of keys and values that it refused


# ----------------------------------------------------------------------------------- blocks of keys
def _blocks(
    segments: Sequence[Tensor],
    size: int,
    stop: int,
    device: torch.device,
    cuts: Sequence[int] = (),
) -> Iterator[tuple[range, Tensor]]:
    """Places and latents of blocks of at most `size` tokens, up to place `stop`.

    No block goes beyond its segment, nor across a place in `cuts`.
    """
    start = 0
    for segment in segments:
        end = min(start + segment.shape[1], stop)
        inside = [cut for cut in cuts if start < cut < end]
        for a, b in zip([start, *inside], [*inside, end], strict=True):
            for first in range(a, b, size):
                last = min(first + size, b)
                latent = segment[:, first - start : last - start]
                yield range(first, last), latent.to(device, non_blocking=True)
        start += segment.shape[1]


def first_tokens(segments: Sequence[Tensor], count: int) -> list[Tensor]:
    """The segments [B or 1, n, R] up to the first `count` tokens."""
    found = []
    for segment in segments:
        if count > 0:
            found.append(segment[:, :count])
        count -= segment.shape[1]
    return found


def _tiles(segments: Sequence[Tensor], size: int, past: int) -> list[range]:
    """Places of the queries, at most `size` at a time and none beyond its segment."""
    tiles, start = [], 0
    for segment in segments:
        end = start + segment.shape[1]
        first = max(start, past)
        tiles += [range(a, min(a + size, end)) for a in range(first, end, size)]
        start = end
    return tiles


def _hidden(
    keys: range, places: range, real_BS: Tensor | None, device: torch.device
) -> Tensor | None:
    """Bool [B or 1, T, 1, n], True where the query at a place must not see a key, or None."""
    hidden = None
    if keys.stop - 1 > places.start:
        later = torch.arange(keys.start, keys.stop, device=device)
        own = torch.arange(places.start, places.stop, device=device)
        hidden = (later > own[:, None])[None, :, None]
    if real_BS is not None:
        padding = ~real_BS[:, None, None, keys.start : keys.stop]
        hidden = padding if hidden is None else hidden | padding
    return hidden


def _softmax(scores: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights over the last axis before their division by `total`, `total`, and log-sum-exp.

    Where all is hidden they are 0, the smallest number above 0, and -inf.
    """
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    largest = scores.detach().amax(dim=-1, keepdim=True)
    if hidden is not None:
        largest = largest.masked_fill(largest == float("-inf"), 0)
    weights = (scores - largest).exp() if _records(scores) else scores.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    lse = (largest + total.log()).squeeze(-1)
    return weights, total.clamp(min=torch.finfo(total.dtype).tiny), lse


class _Merged:
    """Softmax-weighted means over disjoint sets of keys, joined by their log-sum-exp."""

    def __init__(self) -> None:
        self._mean: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, mean: Tensor, lse: Tensor) -> None:
        """Join `mean` [..., V] over keys whose scores have the log-sum-exp `lse` [...]."""
        if self._mean is None or self._lse is None:
            self._mean, self._lse = mean, lse
            return
        total = torch.logaddexp(self._lse, lse)
        safe = total.masked_fill(total == float("-inf"), 0)
        share = (lse - safe).exp().unsqueeze(-1)
        old = self._mean.to(torch.promote_types(mean.dtype, torch.float32))
        if _records(old, mean, share):
            self._mean = old.lerp(mean.to(old.dtype), share)
        else:  # in place, and without a wide copy: these are the largest tensors here
            self._mean = old.mul_(1 - share).addcmul_(mean, share)
        self._lse = total

    def result(self) -> Tensor:
        """The mean over all keys."""
        assert self._mean is not None
        return self._mean


def _records(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product, summed and returned in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide:
        return torch.bmm(a, b)
    if a.is_cuda and not _records(a, b) and "dtype" in torch.ops.aten.bmm.overloads():
        return torch.ops.aten.bmm.dtype(a, b, wide)
    return torch.bmm(a.to(wide), b.to(wide))


__all__ = [
    "FUSED_QUERY_TOKENS",
    "absorbed_is_cheaper",
    "first_tokens",
    "latent_attention",
    "latent_attention_weights",
]
