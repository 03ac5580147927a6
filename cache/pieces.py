"""The pieces in which KDA layers read a call.

A call is one piece, but: a long one is cut for memory's sake, and on a CPU for its caches'; a
padded one behind a cache that can be cropped is cut where the state becomes its anchor, which of
plain rows is taken on the way; and after a crop, or when the log is full, what is left of the log
is read again in front of the call's tokens.

Shapes: B batch, T tokens of this call, S tokens of cache and call, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.cache.state import KDAState
from kimi_linear.inputs.layout import SequenceLayout, sequence_layout
from kimi_linear.ops.runtime import is_exporting

# Tokens of all rows that a KDA layer reads at once where no graph is recorded: its intermediates
# take 130 KB a token at the 48B model's sizes, and longer pieces are not faster.
READ_TOKENS = 16384
# On a CPU: elements of one [B, T, H * K] tensor, which its caches hold, and the fewest tokens of a
# row, beside which its state is small.
CPU_ELEMENTS = 1 << 20
CPU_TOKENS = 256
STEP = 64  # pieces are multiples of it


@dataclass(frozen=True)
class Piece:
    """Tokens that a KDA layer reads at once.

    Attributes:
        start, stop: Their columns; a piece may be empty.
        layout: Their padding and packing.
        anchor: The state after this many of them becomes the cache's anchor; None: none does.
    """

    start: int
    stop: int
    layout: SequenceLayout
    anchor: int | None = None


@dataclass(frozen=True)
class KDAPieces:
    """The pieces of one call, the same for all KDA layers of a model.

    Attributes:
        parts: In order. Columns count from the log's first token if `replays`, else from the
            call's.
        replays: Whether the log is read again in front of the call's tokens, from the anchor.
    """

    parts: tuple[Piece, ...]
    replays: bool = False

    def to(self, device: torch.device, **kwargs: Any) -> "KDAPieces":
        """A copy on another device; accelerate moves inputs to the next layers' with this."""
        moved = (replace(piece, layout=piece.layout.to(device, **kwargs)) for piece in self.parts)
        return replace(self, parts=tuple(moved))


def read_tokens(model: Any, shape: tuple[int, int], device: torch.device) -> int | None:
    """Tokens of each row of [B, T] that KDA layers read at once; None: all, for a graph."""
    if is_exporting() or torch.is_grad_enabled():
        return None
    B, T = shape
    most = max(STEP, READ_TOKENS // B // STEP * STEP)
    if device.type != "cpu" or torch.compiler.is_compiling() or T <= CPU_TOKENS:
        return most
    if any(type(p) is not nn.Parameter for p in model.parameters()):
        return most  # quantised weights would be unpacked for every piece
    linear = model.config.linear_attn_config
    size = B * linear["num_heads"] * linear["head_dim"]
    return min(most, max(CPU_TOKENS, CPU_ELEMENTS // size // STEP * STEP))


def plan_pieces(
    shape: tuple[int, int],
    layout: SequenceLayout,
    size: int | None,
    *,
    rollback_tokens: int = 0,
    num_logged: int | None = None,
    is_stale: bool = False,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
) -> KDAPieces:
    """Decide what a call reads, and where the anchor moves.

    Args:
        shape: B and T.
        layout: Padding and packing of the call's tokens.
        size: Tokens of each row in a piece, see `read_tokens`.
        rollback_tokens: Trailing tokens that `crop` must be able to remove afterwards.
        num_logged: Tokens in the log; None without an anchor.
        is_stale: Whether the states hold tokens that were taken back.
        attention_mask: [B, S], non-zero at real tokens; None if all are real.
        device: Where the layouts' tensors live.
    """
    (B, T), logged = shape, num_logged or 0
    moves = rollback_tokens > 0 and (num_logged is None or logged + T > 2 * rollback_tokens)
    replays = is_stale or (moves and num_logged is not None and rollback_tokens > T)
    if not moves and not replays:
        return KDAPieces(tuple(_parts(Piece(0, T, layout), size)))
    length = T + (logged if replays else 0)

    def piece(start: int, stop: int, anchor: int | None = None) -> list[Piece]:
        if start == stop:
            return [Piece(start, stop, SequenceLayout(), anchor)]
        mask = attention_mask
        if mask is not None:
            first = mask.shape[1] - length
            mask = mask[:, first + start : first + stop]
        own = sequence_layout(B, stop - start, attention_mask=mask, device=device)
        return _parts(Piece(start, stop, own, anchor), size)

    cut = max(length - rollback_tokens, 0)
    if not moves:
        return KDAPieces(tuple(piece(0, length)), replays)
    if attention_mask is None:  # one piece, whose state is wanted on the way
        return KDAPieces(tuple(piece(0, length, cut)), replays)
    return KDAPieces((*piece(0, cut, cut), *piece(cut, length)), replays)


def _parts(piece: Piece, size: int | None) -> list[Piece]:
    """The piece, in several of at most `size` tokens where its rows are plain."""
    if size is None or not piece.layout.is_plain:
        return [piece]
    parts, anchor = [], piece.anchor
    for start in range(piece.start, piece.stop, size):
        stop = min(start + size, piece.stop)
        is_here = anchor is not None and anchor <= stop - start
        parts.append(Piece(start, stop, piece.layout, anchor if is_here else None))
        anchor = None if is_here or anchor is None else anchor - size
    return parts


def read_pieces(
    attention: Any,
    x: Tensor,
    pieces: tuple[Piece, ...],
    state: KDAState | None = None,
    *,
    state_out: Tensor | None = None,
    keep_anchor: Callable[[KDAState], None] | None = None,
) -> tuple[Tensor, KDAState | None]:
    """Run a KDA layer over its input [B, T, D] piece by piece.

    Args:
        attention: The layer, whose `attend` takes a piece, its layout and the state before it.
        x: What the pieces' columns count in.
        pieces: From `plan_pieces`.
        state: Before the first piece; None keeps no state.
        state_out: Where recurrent states may be written.
        keep_anchor: Takes the state that becomes the anchor.

    Returns:
        The layer's output [B, T, D], and the state after the last piece.
    """
    if len(pieces) == 1 and pieces[0].anchor is None:
        return attention.attend(x, pieces[0].layout, state, state_out)[:2]
    state, out = state or KDAState(), None
    outputs = []
    for piece in pieces:
        if piece.anchor == 0 and keep_anchor is not None:
            keep_anchor(state)
        if piece.start == piece.stop:
            continue
        part, cut = x[:, piece.start : piece.stop], piece.anchor or 0
        found, state, at_cut = attention.attend(part, piece.layout, state, state_out, cut)
        if cut and keep_anchor is not None:
            keep_anchor(at_cut)
        if torch.is_grad_enabled() or part.shape[1] == x.shape[1]:
            outputs.append(found)
            continue
        if out is None:  # gigabytes for a long text, which must not be there twice
            out = found.new_empty(*x.shape[:2], found.shape[2])
        out[:, piece.start : piece.stop] = found
    if out is None:
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return out, state
