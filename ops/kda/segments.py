"""Segments: the pieces of a call that the chunked form of KDA computes one after another.

Shapes: B batch, T tokens, R sequences of a segment, L tokens of each of them with padding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.runtime import ceil_div, is_exporting, power_of_two

CHUNK_SIZE = 32
EXPORTED_CHUNK_SIZE = 64  # an exported program takes the lengths of as many chunks
# Elements of one [R, L, H, K] tensor: it fits a CPU's caches and is large enough to hide dispatch.
SEGMENT_ELEMENTS = 1 << 19


class Segment(NamedTuple):
    """Tokens of some sequences, computed together: num_chunks chunks of chunk_size per sequence."""

    rows: slice | Tensor  # sequences: slice, or int64 [R]
    tokens: slice | Tensor  # slice of the token axis, or int64 [R, L] into a packed row
    valid: Tensor | None  # bool [R or 1, L]; False is padding
    chunk_size: int
    num_chunks: int
    is_first: bool  # all its sequences start here
    is_last: bool  # all its sequences end here

    def pick(self, x: Tensor) -> Tensor:
        """The segment's tokens of x [B, T, ...] as [R, L, ...]; padding is zero."""
        if isinstance(self.tokens, slice):
            x = x[self.rows, self.tokens]
            missing = self.chunk_size * self.num_chunks - x.shape[1]
            if isinstance(missing, int) and missing == 0:
                return x
            return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        x = x[0].index_select(0, self.tokens.flatten()).unflatten(0, self.tokens.shape)
        if self.valid is not None:
            x = x.masked_fill(~self.valid.view(self.valid.shape + (1,) * (x.dim() - 2)), 0)
        return x

    def put(self, out: Tensor, x: Tensor) -> None:
        """Write x [R, L, ...] to the segment's places of out [B, T, ...], leaving padding out."""
        if isinstance(self.tokens, slice):
            target = out[self.rows, self.tokens]
            target.copy_(x[:, : target.shape[1]])
        elif self.valid is None:
            out[0, self.tokens.flatten()] = x.flatten(0, 1).to(out.dtype)
        else:
            out[0, self.tokens[self.valid]] = x[self.valid].to(out.dtype)

    def put_chunks(self, out: Tensor, chunks: list[Tensor]) -> None:
        """As `put`, of num_chunks tensors [R * H, C, V]."""
        num_heads = out.shape[2]
        chunks = [x.unflatten(0, (-1, num_heads)) for x in chunks]
        if isinstance(self.tokens, slice) and self.valid is None:
            for place, x in zip(self.by_chunk(out[self.rows, self.tokens]), chunks, strict=True):
                place.copy_(x)
        else:
            self.put(out, torch.stack(chunks, dim=1).transpose(2, 3).flatten(1, 2))

    def by_chunk(self, x_RLH: Tensor) -> Tensor:
        """[R, L, H, ...] -> view [chunks, R, H, C, ...]."""
        x = x_RLH.unflatten(1, (self.num_chunks, self.chunk_size))
        return x.permute(1, 0, 3, 2, *range(4, x.dim()))


def plan_segments(x_BTHK: Tensor, cu_seqlens: Tensor | None, largest_size: int) -> list[Segment]:
    """Segments in the order of their tokens, each of at most `SEGMENT_ELEMENTS` per tensor.

    Args:
        x_BTHK: any of the inputs, for its sizes and device.
        cu_seqlens: ends of packed sequences, or None.
        largest_size: the larger one of K and V.
    """
    B, T, H, _ = x_BTHK.shape
    max_tokens = max(CHUNK_SIZE, SEGMENT_ELEMENTS // (H * largest_size))
    if T == 0:
        return []
    if cu_seqlens is None:
        return _plan_batch(B, T, max_tokens, x_BTHK.device)
    return _plan_packed(cu_seqlens.tolist(), max_tokens, x_BTHK.device)


def _plan_batch(B: int, T: int, max_tokens: int, device: torch.device) -> list[Segment]:
    """Segments of B sequences of T tokens: whole chunks first, then one padded remainder. For an
    exported program, whose sizes are symbols, all in one."""
    if is_exporting():
        size, tokens = EXPORTED_CHUNK_SIZE, slice(0, T)
        count = ceil_div(T, size)
        real = torch.arange(count * size, device=device) < T
        return [Segment(slice(0, B), tokens, real[None], size, count, True, True)]
    segments = []
    whole = T - T % CHUNK_SIZE
    row_step = max(1, max_tokens // min(T, CHUNK_SIZE))
    for row in range(0, B, row_step):
        rows = slice(row, min(B, row + row_step))
        step = max(CHUNK_SIZE, max_tokens // (rows.stop - row) // CHUNK_SIZE * CHUNK_SIZE)
        for start in range(0, whole, step):
            end = min(whole, start + step)
            count = (end - start) // CHUNK_SIZE
            tokens = slice(start, end)
            segments.append(Segment(rows, tokens, None, CHUNK_SIZE, count, start == 0, end == T))
        if whole < T:
            size, valid = power_of_two(T - whole), None
            if size != T - whole:
                valid = (torch.arange(size, device=device) < T - whole)[None]
            segments.append(Segment(rows, slice(whole, T), valid, size, 1, whole == 0, True))
    return segments


def _plan_packed(ends: list[int], max_tokens: int, device: torch.device) -> list[Segment]:
    """Segments of packed sequences.

    Whole chunks run over all sequences that still have some; remainders run together by size, so
    that padding never doubles the work, whatever the mix of lengths.
    """
    starts, stops = torch.tensor(ends[:-1]), torch.tensor(ends[1:])
    whole, rest = (stops - starts) // CHUNK_SIZE, (stops - starts) % CHUNK_SIZE
    segments: list[Segment] = []

    def add(rows: Tensor, begin: Tensor, size: int, count: int) -> None:
        if not rows.numel():
            return
        for row in rows.split(max(1, max_tokens // (size * count))):
            tokens = begin[row, None] + torch.arange(size * count)
            real = tokens < stops[row, None]
            valid = None if bool(real.all()) else real.to(device)
            is_first = bool((begin == starts)[row].all())
            is_last = bool((tokens[:, -1] + 1 >= stops[row]).all())
            tokens = tokens.clamp(max=ends[-1] - 1).to(device)
            segments.append(Segment(row.to(device), tokens, valid, size, count, is_first, is_last))

    done = 0
    for level in sorted(set(whole.tolist()) - {0}):
        rows = (whole >= level).nonzero().flatten()
        while done < level:
            count = min(level - done, max(1, max_tokens // (CHUNK_SIZE * len(rows))))
            add(rows, starts + done * CHUNK_SIZE, CHUNK_SIZE, count)
            done += count
    for size in (1 << i for i in range(CHUNK_SIZE.bit_length())):
        rows = ((rest > size // 2) & (rest <= size)).nonzero().flatten()
        add(rows, starts + whole * CHUNK_SIZE, size, 1)
    return segments
