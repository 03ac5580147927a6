"""Blocks of keys for attention in pieces: cut, masked, and merged by their log-sum-exp.

Shapes: B batch, T query tokens, S key tokens (the last T are the queries' own), H heads, N key size
without the shared part, P shared key part, K = N + P, V value size, L latent rank, R = L + P,
n tokens of a block.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kimi_linear.ops.runtime import needs_grad


# ----------------------------------------------------------------------------------------- cutting
def num_tokens(segments: Sequence[Tensor]) -> int:
    """S of segments [B or 1, tokens, R]."""
    return sum(segment.shape[1] for segment in segments)


def first_tokens(segments: Sequence[Tensor], count: int) -> list[Tensor]:
    """The segments [B or 1, tokens, R] cut after the first `count` tokens."""
    found = []
    for segment in segments:
        if count > 0:
            found.append(segment[:, :count])
        count -= segment.shape[1]
    return found


def key_blocks(
    segments: Sequence[Tensor], size: int, stop: int, cuts: Sequence[int] = ()
) -> Iterator[tuple[range, Tensor]]:
    """Places and latents of blocks of at most `size` tokens, up to place `stop`.

    No block goes beyond its segment, nor across a place in `cuts`, which rise.
    """
    start = 0
    for segment in segments:
        end = min(start + segment.shape[1], stop)
        for a, b in pairwise([start, *(cut for cut in cuts if start < cut < end), end]):
            for first in range(a, b, size):
                last = min(first + size, b)
                yield range(first, last), segment[:, first - start : last - start]
        start += segment.shape[1]


def query_tiles(segments: Sequence[Tensor], size: int, past: int) -> list[range]:
    """Places of the queries, at most `size` at a time and none beyond its segment."""
    blocks = key_blocks(segments, size, num_tokens(segments), (past,))
    return [places for places, _ in blocks if places.start >= past]


# ----------------------------------------------------------------------------- masking and softmax
def unseen_mask(
    keys: range, places: range, real_BS: Tensor | None, device: torch.device
) -> Tensor | None:
    """Bool [B or 1, T, 1, n], True where the query at a place must not see a key; None: nowhere."""
    unseen = None
    if keys.stop - 1 > places.start:
        later = torch.arange(keys.start, keys.stop, device=device)
        own = torch.arange(places.start, places.stop, device=device)
        unseen = (later > own[:, None])[None, :, None]
    if real_BS is not None:
        padding = ~real_BS[:, None, None, keys.start : keys.stop]
        unseen = padding if unseen is None else unseen | padding
    return unseen


def block_softmax(scores: Tensor, unseen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Weights over the last axis before their division by `total`, `total`, and log-sum-exp.

    Where all is unseen, these are 0, the smallest number above 0, and -inf.
    """
    if unseen is not None:
        scores = scores.masked_fill(unseen, float("-inf"))
    largest = scores.detach().amax(dim=-1, keepdim=True)
    if unseen is not None:
        largest = largest.masked_fill(largest == float("-inf"), 0)
    weights = (scores - largest).exp() if needs_grad(scores) else scores.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    lse = (largest + total.log()).squeeze(-1)
    return weights, total.clamp(min=torch.finfo(total.dtype).tiny), lse


def wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with sums and result in at least float32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    if a.dtype == wide:
        return torch.bmm(a, b)
    if a.is_cuda and not needs_grad(a, b) and "dtype" in torch.ops.aten.bmm.overloads():
        return torch.ops.aten.bmm.dtype(a, b, wide)
    return torch.bmm(a.to(wide), b.to(wide))


# ----------------------------------------------------------------------------------------- merging
class MergedBlocks:
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
        if needs_grad(old, mean, share):
            self._mean = old.lerp(mean.to(old.dtype), share)
        else:  # in place, and without a wide copy: these are the largest tensors here
            self._mean = old.mul_(1 - share).addcmul_(mean, share)
        self._lse = total

    def result(self) -> Tensor:
        """The mean over all keys."""
        assert self._mean is not None
        return self._mean
