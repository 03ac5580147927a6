"""The cache of one KDA layer: its state, and what rollback needs.

Shapes: B batch, T tokens of a call, X hidden size.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kimi_linear.cache.layer import LayerCache, may_write
from kimi_linear.cache.pieces import KDAPieces, read_pieces
from kimi_linear.cache.rollback import Rollback
from kimi_linear.cache.state import KDAState

# Tokens that `crop` can remove by default.
ROLLBACK_TOKENS = 64
# At least this many after `activate_past_recording`, by which Transformers announces drafts.
SPECULATIVE_ROLLBACK_TOKENS = 256


class KDALayerCache(LayerCache):
    """State of one KDA layer, of fixed size.

    Args:
        rollback_tokens: Minimum number of trailing tokens `crop` can remove; 0 disables it.

    Attributes:
        state: After the last token read.
        rollback: Anchor and log.
        is_stale: Whether `state` holds tokens that were taken back.
    """

    kind = "linear_attention"

    def __init__(self, rollback_tokens: int = ROLLBACK_TOKENS) -> None:
        super().__init__()
        self.state = KDAState()
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
        self.state = KDAState(
            _overwrite(self.state.conv, state.conv),
            _overwrite(self.state.recurrent, state.recurrent),
        )
        self.is_stale = False
        if self.rollback.tokens == 0:
            self.rollback.drop()
        else:
            self.rollback.append(logged)

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
        if left < self.num_tokens:
            self.rollback.crop(self.num_tokens - left)
            self.num_tokens, self.is_stale = left, True

    def fork(self) -> "KDALayerCache":
        """An independent copy that continues from here."""
        other = copy.copy(self)
        other.rollback = copy.copy(self.rollback)
        other._map(Tensor.clone)
        return other

    def prepare_step(self, num_rows: int, dtype: torch.dtype) -> bool:
        """Prepare a decode step that writes one token in place; False if it is impossible."""
        conv, state, log = self.state.conv, self.state.recurrent, self.rollback.log
        if conv is None or state is None or self.is_stale:
            return False
        if conv.shape[0] != num_rows or conv.dtype != dtype or state.dtype != torch.float32:
            return False
        if self.rollback.tokens == 0:
            self.rollback.drop()
        elif log is None or log.dtype != dtype or log.shape[0] != num_rows or not may_write(log):
            return False
        self.state = self.state.map(_in_place)
        return self.rollback.tokens == 0 or self.rollback.has_room

    def step_tensors(self, num_rows: int) -> list[Tensor | None] | None:
        """What a decode step writes to; None if another step in place cannot follow the last."""
        state = self.state.recurrent
        if state is None or state.shape[0] != num_rows or self.is_stale:
            return None
        if self.rollback.tokens and not self.rollback.has_room:
            return None
        return [self.state.conv, state, self.rollback.log]

    @property
    def is_anchor_due(self) -> bool:
        """Whether `move_anchor` is due before the next decode step."""
        return not self.is_stale and self.state.recurrent is not None and self.rollback.is_due

    def move_anchor(self) -> None:
        """See `Rollback.move_anchor`."""
        self.rollback.move_anchor(self.state)

    def count_step(self) -> None:
        """Count the token that a decode step has written."""
        self.num_tokens += 1
        if self.rollback.num_logged is not None:
            self.rollback.num_logged += 1

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held: "linear_attention" for the state, "rollback" for anchor and log."""
        held = {"linear_attention": self.state.tensors(), "rollback": self.rollback.tensors()}
        return {kind: sum(x.nbytes for x in tensors) for kind, tensors in held.items()}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
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
