"""The cache of one KDA layer: its state, and what rollback needs.

Shapes: B batch, T tokens of a call, X hidden size.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kimi_linear.cache.layer import LayerCache, may_write
from kimi_linear.cache.pending import STEP_TOKENS, PendingUpdates
from kimi_linear.cache.pieces import KDAPieces, Piece, read_pieces
from kimi_linear.cache.rollback import Rollback
from kimi_linear.cache.state import KDAState
from kimi_linear.inputs.layout import SequenceLayout

# Tokens that `crop` can remove by default.
ROLLBACK_TOKENS = 64
# At least this many after `activate_past_recording`, by which Transformers announces drafts.
SPECULATIVE_ROLLBACK_TOKENS = 256


class KDALayerCache(LayerCache):
    """State of one KDA layer, of fixed size.

    Args:
        rollback_tokens: Minimum number of trailing tokens `crop` can remove; 0 disables it.

    Attributes:
        state: After the last token read, but for those that are pending.
        pending: What the last tokens, if a step of several has read them, will change.
        rollback: Anchor and log.
        is_stale: Whether `state` holds tokens that were taken back.
    """

    kind = "linear_attention"

    def __init__(self, rollback_tokens: int = ROLLBACK_TOKENS) -> None:
        super().__init__()
        self.state = KDAState()
        self.pending = PendingUpdates()
        self.rollback = Rollback(rollback_tokens)
        self.is_stale = False

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.rollback.tokens > 0

    @property
    def num_rows(self) -> int | None:
        return next((x.shape[0] for x in self.state.tensors()), None)

    def activate_past_recording(self) -> None:
        """Keep enough for speculative decoding from now on."""
        self.rollback.tokens = max(self.rollback.tokens, SPECULATIVE_ROLLBACK_TOKENS)

    def reset(self) -> None:
        super().reset()
        self.state, self.is_stale = KDAState(), False
        self.pending = PendingUpdates()
        self.rollback.reset()

    def read(self, attention: Any, hidden_states: Tensor, pieces: KDAPieces) -> Tensor:
        """Run the layer's attention over a call behind this cache, and keep its states.

        Args:
            attention: The KDA layer, see `read_pieces`.
            hidden_states: [B, T, X].
            pieces: The call's.

        Returns:
            [B, T, X].
        """
        if not pieces.replays:
            self.settle()
        x, state = hidden_states, self.state
        if pieces.replays:
            state, logged = self.rollback.anchor, self.rollback.logged()
            x = x if logged is None else torch.cat([logged.to(x.dtype), x], dim=1)
        out, after = read_pieces(
            attention,
            x,
            pieces.parts,
            state,
            state_out=self._writable_state(x.shape[0]),
            keep_anchor=self.rollback.keep,
        )
        assert after is not None
        anchors = [part.start + part.anchor for part in pieces.parts if part.anchor is not None]
        # log what lies behind the anchor: all since a new one, else this call's tokens
        self._take(after, x[:, anchors[0] :] if anchors else hidden_states)
        self._count(hidden_states.shape[1])
        return out[:, x.shape[1] - hidden_states.shape[1] :]

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse keys and values, which attention layers hand to their caches."""
        raise TypeError("a KDA layer's cache takes states, not keys and values: see read()")

    def _take(self, state: KDAState, logged: Tensor) -> None:
        """Hold the state after a call; `logged` [B, .., X] goes behind the log."""
        self._hold(state)
        if self.rollback.tokens == 0:
            self.rollback.drop()
        else:
            self.rollback.append(logged)

    def hold(self, state: KDAState, num_tokens: int) -> None:
        """Take over the state after so many more tokens, of which `crop` takes none back."""
        self._hold(state)
        self.rollback.drop()
        self._count(num_tokens)

    def _hold(self, state: KDAState) -> None:
        """Take over the state after the last token."""
        self.state = KDAState(
            _overwrite(self.state.conv, state.conv),
            _overwrite(self.state.recurrent, state.recurrent),
        )
        self.is_stale, self.pending.count = False, 0

    def _count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self.is_initialized = True

    def _writable_state(self, num_rows: int) -> Tensor | None:
        """The recurrent state's tensor if the next state may be written over it."""
        state = self.state.recurrent
        fits = state is not None and state.shape[0] == num_rows and may_write(state)
        return state if fits else None

    def check_crop(self, tokens_to_remove: int) -> int:
        left = super().check_crop(tokens_to_remove)
        oldest = self.num_tokens - (self.rollback.num_logged or 0)
        if left < oldest:
            raise ValueError(
                f"crop({tokens_to_remove}) would leave {left} of {self.num_tokens} tokens, which "
                f"is not possible: at least {oldest} must stay, since KDA states go back only as "
                f"far as rollback_tokens={self.rollback.tokens} of the cache keeps them; make it "
                "with KimiLinearCache(config, rollback_tokens=...), or keep a copy of it"
            )
        return left

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: -n removes n, a positive number is how many stay."""
        left = self.check_crop(tokens_to_remove)
        removed = self.num_tokens - left
        if removed:
            self.rollback.crop(removed)
            self.num_tokens = left
            self.is_stale |= removed > self.pending.count
            self.pending.count = 0 if self.is_stale else self.pending.count - removed

    def begin_draft(self) -> None:
        """Have `crop` remove the next call's tokens, though nothing else of the text."""
        if not self.is_stale:
            self.settle()
            self.rollback.keep(self.state)
        self.rollback.tokens = STEP_TOKENS

    def end_draft(self) -> None:
        """Keep nothing again, once the next call has read what a crop left of the last."""
        self.rollback.tokens = 0

    def settle(self) -> None:
        """Take what is pending into the state, for all that reads it but a step."""
        if self.pending.count:
            self.state = self.pending.taken_in(self.state, self.num_tokens)
            self.pending.count = 0

    def fork(self) -> "KDALayerCache":
        """An independent copy that continues from here."""
        self.settle()
        other = copy.copy(self)
        other.rollback = copy.copy(self.rollback)
        other._map(Tensor.clone)
        return other

    def prepare_step(self, num_rows: int, num_tokens: int, dtype: torch.dtype) -> bool:
        """Prepare a decode step that writes tokens in place; False if it is impossible.

        Args:
            num_rows: B.
            num_tokens: Of each row.
            dtype: The model's.
        """
        conv, state, log = self.state.conv, self.state.recurrent, self.rollback.log
        if conv is None or state is None or self.is_stale:
            return False
        if conv.shape[0] != num_rows or conv.dtype != dtype or state.dtype != torch.float32:
            return False
        if self.rollback.tokens == 0:
            self.rollback.drop()
        elif log is None or log.dtype != dtype or log.shape[0] != num_rows or not may_write(log):
            return False
        elif num_tokens > 1:
            self.rollback.reserve(2 * STEP_TOKENS)
        if self._lacks_room(num_rows, num_tokens):
            self.settle()
            self.pending.reserve(self.state, num_tokens)
        self.state = self.state.map(_in_place)
        return self.rollback.tokens == 0 or self.rollback.has_room(num_tokens)

    def step_tensors(self, num_rows: int, num_tokens: int) -> list[Tensor | None] | None:
        """What a decode step writes to; None if another step in place cannot follow the last."""
        state, pending = self.state.recurrent, self.pending
        if state is None or state.shape[0] != num_rows or self.is_stale:
            return None
        if self.rollback.tokens and not self.rollback.has_room(num_tokens):
            return None
        if self._lacks_room(num_rows, num_tokens):
            return None
        return [self.state.conv, state, self.rollback.log, pending.updates, pending.inputs]

    def catch_up(self, attention: Any) -> None:
        """Make a stale state, of a text without padding, that of the last token: read what is left
        of the log again.

        Args:
            attention: The KDA layer, see `read_pieces`.
        """
        state, logged = self.rollback.anchor, self.rollback.logged()
        if logged is not None:
            piece = Piece(0, logged.shape[1], SequenceLayout())
            x = logged.to(attention.o_proj.weight.dtype)
            _, read = read_pieces(attention, x, (piece,), state)
            assert read is not None
            state = read
        else:  # the anchor itself stays
            state = state.map(Tensor.clone)
        self._hold(state)

    def _lacks_room(self, num_rows: int, num_tokens: int) -> bool:
        """Whether the tokens of a step have to be pending, and `pending` has no room for them."""
        is_needed = num_tokens > 1 and self.rollback.tokens > 0
        is_used = is_needed or self.pending.updates is not None
        return is_used and not self.pending.has_room(num_rows, num_tokens)

    def is_anchor_due(self, num_tokens: int) -> bool:
        """Whether `move_anchor` is due before a decode step of `num_tokens` tokens a row."""
        is_there = not self.is_stale and self.state.recurrent is not None
        return is_there and self.rollback.is_due(num_tokens)

    def move_anchor(self, num_tokens: int) -> None:
        """See `Rollback.move_anchor`."""
        self.settle()
        self.rollback.move_anchor(self.state, num_tokens)

    def count_step(self, num_tokens: int) -> None:
        """Count the tokens of a row that a decode step has written."""
        self.num_tokens += num_tokens
        if self.rollback.num_logged is not None:
            self.rollback.num_logged += num_tokens
        if self.pending.updates is not None:
            self.pending.count = num_tokens

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held: "linear_attention" for the state, "rollback" for anchor, log and updates."""
        undo = self.rollback.tensors() + self.pending.tensors()
        held = {"linear_attention": self.state.tensors(), "rollback": undo}
        return {kind: sum(x.nbytes for x in tensors) for kind, tensors in held.items()}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.settle()
        self.pending = PendingUpdates()  # made again where a step takes several tokens
        self.state = self.state.map(function)
        self.rollback.map(function)


def _in_place(x: Tensor) -> Tensor:
    """`x` if a kernel may write over it, else a copy."""
    writable = may_write(x) and x.is_contiguous()
    return x if writable else x.clone(memory_format=torch.contiguous_format)


def _overwrite(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """`new`, in the memory of `old` where that is possible."""
    if old is None or new is None or old is new or new.requires_grad or not may_write(old):
        return new
    same = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return old.copy_(new) if same else new
