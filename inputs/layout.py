"""Where sequences begin and which tokens are real, worked out once per forward from the inputs.

Padding (left, right or interior) and packing (several sequences in one row) reach convolution, KDA
and attention in one form: the real tokens of all rows laid end to end, and the boundaries between
sequences in that line.

Shapes: B batch, T tokens of this call, S tokens of cache and call, R real tokens of this call,
N sequences.
"""

import functools
import reprlib
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.ops.runtime import is_exporting

# A raw gate whose softplus and whose sigmoid are 0 in every dtype.
SILENT = -1e4


@dataclass(frozen=True)
class SequenceLayout:
    """Padding and packing of one call. A field is None where there is nothing to say.

    Attributes:
        token_index: [R] int64, places of the real tokens in the flattened [B * T]; None if all are
            real.
        cu_seqlens: [N + 1] int32, sequence boundaries among the real tokens; None if each row is
            one sequence without padding. A sequence may be empty: every row opens one, which
            continues that row's cache.
        row_first, row_last: [B] int64, the first and the last of each row's sequences.
        sequence_ids: [B, T] int64, number of each token's sequence within its row; None unless rows
            are packed.
        num_places: B * T.
        order: [B, T] int64, each row's columns, real ones first; in place of `token_index` and
            `cu_seqlens` where a compiler traces the call, whose shapes cannot depend on values.
        counts: [B] int64, real tokens of each row, with `order`; alone, if each row has them first.
        least: With `counts` alone, how many tokens each row has at least.
    """

    token_index: Tensor | None = None
    cu_seqlens: Tensor | None = None
    row_first: Tensor | None = None
    row_last: Tensor | None = None
    sequence_ids: Tensor | None = None
    num_places: int = 0
    order: Tensor | None = None
    counts: Tensor | None = None
    least: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether each row is one sequence, all real."""
        return self.cu_seqlens is None and self.counts is None

    @property
    def is_packed(self) -> bool:
        """Whether some row holds more than one sequence."""
        return self.sequence_ids is not None

    @functools.cached_property
    def ends(self) -> list[int]:
        """`cu_seqlens` on the host, which waits for the device once."""
        assert self.cu_seqlens is not None
        return self.cu_seqlens.tolist()

    @functools.cached_property
    def flash_lengths(self) -> dict[str, Any]:
        """What Transformers' flash attention takes for sequences that lie end to end."""
        assert self.cu_seqlens is not None
        longest = int(self.cu_seqlens.diff().max())
        lengths = {f"max_length_{x}": longest for x in "qk"}
        return {**{f"cu_seq_lens_{x}": self.cu_seqlens for x in "qk"}, **lengths}

    @functools.cached_property
    def token_starts(self) -> Tensor | None:
        """[R] int32, for each real token the first one of its sequence; None for plain rows."""
        if self.cu_seqlens is None:
            return None
        count = self.num_places if self.token_index is None else self.token_index.numel()
        token = torch.arange(count, dtype=torch.int32, device=self.cu_seqlens.device)
        sequence = torch.searchsorted(self.cu_seqlens[1:], token, right=True)
        return self.cu_seqlens.to(torch.int32)[sequence]

    def to(self, device: torch.device, **kwargs: Any) -> "SequenceLayout":
        """A copy on another device; accelerate moves inputs to the next layers' with this."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: x for name, x in own.items() if isinstance(x, Tensor)}
        moved: dict[str, Any] = {name: x.to(device, **kwargs) for name, x in tensors.items()}
        return replace(self, **moved)

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] to [1, R, ...]: real tokens end to end, or with `order` [B, T, ...]: each
        row's real tokens first. Plain rows stay as they are."""
        if self.order is not None:
            return x.gather(1, _like(self.order, x))
        if self.cu_seqlens is None:
            return x
        flat = x.flatten(0, 1)
        return (flat if self.token_index is None else flat[self.token_index]).unsqueeze(0)

    def unpack(self, x: Tensor, batch_size: int) -> Tensor:
        """[1, R, ...] to [B, T, ...], zeros at padding; the inverse of `pack`."""
        if self.order is not None:
            real = x.masked_fill(_like(self.is_behind(x), x), 0)
            return torch.zeros_like(x).scatter(1, _like(self.order, x), real)
        if self.cu_seqlens is None:
            return x
        if self.token_index is None:
            return x.reshape(batch_size, -1, *x.shape[2:])
        flat = x.new_zeros(self.num_places, *x.shape[2:]).index_copy(0, self.token_index, x[0])
        return flat.reshape(batch_size, -1, *x.shape[2:])

    def is_behind(self, packed: Tensor) -> Tensor:
        """[B, T] bool, of what `pack` returned with `counts`: padding behind the real tokens."""
        assert self.counts is not None
        return torch.arange(packed.shape[1], device=packed.device) >= self.counts[:, None]

    def silenced(self, *raw: Tensor) -> tuple[Tensor, ...]:
        """Raw gates [B, T, ...] of KDA, as `pack` orders them, without effect at padding: no decay,
        and a beta of 0. With `least`, they are written to."""
        if self.counts is None:
            return raw
        if not self.least:
            return tuple(x.masked_fill(_like(self.is_behind(x), x), SILENT) for x in raw)
        for x in raw:
            self.fill_behind(x, SILENT)
        return raw

    def fill_behind(self, x: Tensor, value: float) -> None:
        """Write a value to [B, T, ...], as `pack` orders it, behind the real tokens."""
        rest = x[:, self.least :]
        rest.masked_fill_(_like(self.is_behind(x)[:, self.least :], rest), value)

    def last_inputs(self, x: Tensor, before: Tensor | None, count: int) -> Tensor:
        """[B, D, count]: with `counts`, the last real ones of `before` [B, D, count] (None: zeros)
        and x [B, T, D]."""
        assert self.counts is not None
        width = x.shape[2]
        places = self.counts[:, None] + torch.arange(-count, 0, device=x.device)  # in x, or before
        of_x = places.clamp(min=0)[..., None].expand(-1, -1, width)
        found = x.gather(1, of_x).transpose(1, 2)
        older: Tensor | int = 0
        if before is not None:
            of_before = (places + count).clamp(max=count - 1)[:, None].expand(-1, width, -1)
            older = before.to(x.dtype).gather(2, of_before)
        return torch.where((places < 0)[:, None], older, found)

    def conv_boundaries(self) -> dict[str, Any]:
        """What `ops/short_conv` is told of padding and packing."""
        return {
            "cu_seqlens": self.cu_seqlens,
            "token_starts": lambda: self.token_starts,
            "last_inputs": None if self.counts is None else self.last_inputs,
        }

    def initial_states(self, row_states: Tensor | None) -> Tensor | None:
        """[B, ...] cached states to [N, ...] for each row's first sequence; zeros elsewhere."""
        if not self.is_packed or row_states is None:
            return row_states
        assert self.cu_seqlens is not None and self.row_first is not None
        states = row_states.new_zeros(self.cu_seqlens.numel() - 1, *row_states.shape[1:])
        return states.index_copy(0, self.row_first, row_states)

    def row_states(self, states: Tensor | None) -> Tensor | None:
        """[N, ...] final states to [B, ...]: that of each row's last sequence."""
        if not self.is_packed or states is None:
            return states
        return states[self.row_last]


def sequence_layout(
    batch_size: int,
    num_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    device: torch.device | None = None,
) -> SequenceLayout:
    """Find padding and sequence boundaries. Sources that agree may be given together.

    Args:
        batch_size, num_tokens: B and T of this call.
        attention_mask: [B, S], non-zero at real tokens; the last T columns are those of this call.
        position_ids: [B or 1, T]; a real token whose position does not exceed that of the real
            token before it begins a sequence.
        seq_idx: [B or 1, T] integers; a change between real tokens begins a sequence.
        cu_seq_lens: [N + 1] boundaries in the flattened [B * T], from 0 to B * T.
        device: Where the layout's tensors live.

    Returns:
        The layout; an empty one if there is neither padding nor packing.

    Raises:
        ValueError: If an argument is no tensor, has a wrong shape, or `cu_seq_lens` does not run
            from 0 to B * T.
        RuntimeError: From an exported program, whose rows must be one sequence each, if they are
            packed.
    """
    real = _real_tokens(attention_mask, batch_size, num_tokens, device)
    if cu_seq_lens is not None:
        cu_seq_lens = _sequence_numbers(cu_seq_lens, batch_size, num_tokens, device)
    sources = [
        (_expand(name, ids, batch_size, num_tokens, device), begins)
        for name, ids, begins in (
            ("position_ids", position_ids, torch.le),
            ("seq_idx", seq_idx, torch.ne),
            ("cu_seq_lens_q", cu_seq_lens, torch.ne),
        )
        if ids is not None
    ]
    if (num_tokens == 1 or not sources) and (real is None or torch.compiler.is_compiling()):
        return traced_layout(real)
    # column of the real token before each token of this call, -1 if there is none
    previous = _previous_real(real, batch_size, num_tokens, device)
    starts = torch.zeros(batch_size, num_tokens, dtype=torch.bool, device=device)
    for ids, begins in sources:
        starts |= begins(ids, ids.gather(1, previous.clamp(min=0)))
    starts &= previous >= 0  # a row's first sequence is open anyway
    if real is not None:
        starts &= real  # padding begins nothing
    if is_exporting():
        torch._assert_async(~starts.any(), "packed rows are not allowed in an exported program")
        return traced_layout(real)
    is_packed = bool(starts.any())
    if not is_packed and real is None:
        return SequenceLayout()
    return _layout(starts, real, is_packed)


def traced_layout(real: Tensor | None) -> SequenceLayout:
    """The layout of rows of one sequence each, worked out without looking at values."""
    if real is None:
        return SequenceLayout()
    order = (~real).to(torch.int8).sort(dim=1, stable=True).indices
    return SequenceLayout(num_places=real.numel(), order=order, counts=real.sum(dim=1))


def _like(index: Tensor, x: Tensor) -> Tensor:
    """[B, T] as [B, T, ...] in the shape of x."""
    return index.view(*index.shape, *[1] * (x.ndim - 2)).expand_as(x)


def _layout(starts: Tensor, real: Tensor | None, is_packed: bool) -> SequenceLayout:
    """The layout of rows whose sequences begin at `starts` [B, T]; `real` [B, T] are no padding."""
    sequence_ids = starts.long().cumsum(1)
    per_row = sequence_ids[:, -1] + 1
    row_last = per_row.cumsum(0) - 1
    row_first = row_last - per_row + 1
    token_index = None
    token_sequence = (sequence_ids + row_first[:, None]).flatten()
    if real is not None:
        token_index = real.flatten().nonzero()[:, 0]
        token_sequence = token_sequence[token_index]
    lengths = torch.bincount(token_sequence, minlength=int(row_last[-1]) + 1)
    return SequenceLayout(
        token_index=token_index,
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        row_first=row_first,
        row_last=row_last,
        sequence_ids=sequence_ids if is_packed else None,
        num_places=starts.numel(),
    )


def _real_tokens(
    attention_mask: Tensor | None, batch_size: int, num_tokens: int, device: torch.device | None
) -> Tensor | None:
    """[B, T] bool, or None if every token of this call is real."""
    if attention_mask is None:
        return None
    check_attention_mask(attention_mask, batch_size, num_tokens)
    real = attention_mask[:, -num_tokens:].to(device) != 0
    return real if torch.compiler.is_compiling() or not bool(real.all()) else None


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}={type(x).__name__} is not allowed: it must be a tensor")


def check_attention_mask(attention_mask: Tensor, batch_size: int, num_tokens: int) -> None:
    """Raise ValueError unless it is a tensor [B, at least T]."""
    _check_tensor("attention_mask", attention_mask)
    if (
        attention_mask.ndim != 2
        or attention_mask.shape[0] != batch_size
        or attention_mask.shape[1] < num_tokens
    ):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, which is not allowed: it "
            f"must be [batch, tokens] = [{batch_size}, at least {num_tokens}] with zeros at "
            "padding (one of four dimensions is for calls without labels and cache)"
        )


def _previous_real(
    real: Tensor | None, batch_size: int, num_tokens: int, device: torch.device | None
) -> Tensor:
    """[B, T] int64: column of the last real token before each column, -1 if there is none."""
    if real is None:
        last = torch.arange(num_tokens, device=device).expand(batch_size, -1)
    else:
        last = _last_real(real)
    return F.pad(last, (1, 0), value=-1)[:, :-1]


def _last_real(real: Tensor) -> Tensor:
    """[B, T] int64: of each column the last real one up to it, -1 where there is none."""
    columns = torch.arange(real.shape[1], device=real.device)
    return torch.where(real, columns, -1).cummax(1).values


def last_real_columns(real: Tensor) -> Tensor:
    """[B, T] int64: for each column the last real one up to it, or itself where there is none.

    Args:
        real: [B, T] bool, False at padding.
    """
    last = _last_real(real)
    return torch.where(last < 0, torch.arange(real.shape[1], device=real.device), last)


def _expand(
    name: str, ids: Tensor, batch_size: int, num_tokens: int, device: torch.device | None
) -> Tensor:
    _check_tensor(name, ids)
    if ids.ndim != 2 or ids.shape[0] not in (1, batch_size) or ids.shape[1] != num_tokens:
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}, which is not allowed: it must be "
            f"[batch or 1, tokens] = [{batch_size} or 1, {num_tokens}]"
        )
    return ids.to(device).expand(batch_size, -1)


def sequence_ends(cu_seq_lens: Tensor, places: int, num_sequences: int | None = None) -> Tensor:
    """[N + 1] int64: `cu_seq_lens_q`, if it is right; ValueError if not.

    Args:
        cu_seq_lens: As it was given.
        places: B * T, where it ends.
        num_sequences: N; None if any number is.
    """
    _check_tensor("cu_seq_lens_q", cu_seq_lens)
    if cu_seq_lens.is_floating_point():
        raise ValueError(
            f"cu_seq_lens_q is {cu_seq_lens.dtype}, which is not allowed: it must be of integers"
        )
    ends = cu_seq_lens.flatten().long()
    if ends.numel() < 2 or ends[0] != 0 or ends[-1] != places or (ends.diff() < 0).any():
        raise ValueError(
            f"cu_seq_lens_q={reprlib.repr(ends.tolist())} is not allowed: it must rise from 0 to "
            f"batch * tokens = {places}"
        )
    if num_sequences not in (None, ends.numel() - 1):
        raise ValueError(
            f"cu_seq_lens_q has {ends.numel() - 1} sequences, which is not allowed: it must have "
            f"one for each of the {num_sequences} caches"
        )
    return ends


def _sequence_numbers(
    cu_seq_lens: Tensor, batch_size: int, num_tokens: int, device: torch.device | None
) -> Tensor:
    """[B, T] int64: the sequence that each place belongs to."""
    places = batch_size * num_tokens
    ends = sequence_ends(cu_seq_lens, places).to(device)
    place = torch.arange(places, device=device)
    return torch.searchsorted(ends, place, right=True).reshape(batch_size, num_tokens)
