"""Rollback: how a KDA layer's last tokens are removed.

A KDA state is a running sum and has no inverse. A cache that can be cropped therefore keeps an
anchor, the state as it was some tokens ago, and a log of the layer's inputs since then. `crop`
shortens the log and declares the state stale; the next call reads what is left of the log again,
from the anchor, in front of its own tokens (`pieces.py`).

The cost, per KDA layer and row: one more copy of the state and 2 * `tokens` inputs of the layer in
memory; one more run of the layer's attention over the log every `tokens` steps of decoding, and
over what is left of it after a crop. Steps by the decode graph keep a second copy of the state
instead of running over the log (`move_anchor`), and take the tokens of the last one back without
any of this (`pending.py`).

Shapes: B batch, X hidden size.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kimi_linear.cache.layer import may_write
from kimi_linear.cache.state import KDAState
from kimi_linear.ops.runtime import needs_grad


class Rollback:
    """Anchor and log of one KDA layer.

    Args:
        tokens: Minimum number of trailing tokens `crop` can remove; 0 disables it.

    Attributes:
        anchor: The state `num_logged` tokens ago.
        log: [B, capacity, X], the layer's inputs since the anchor in its first `num_logged` places.
        num_logged: None without an anchor.
        next_anchor: The anchor to come, between decode steps: the state after the log's first
            `next_anchor_tokens` tokens.
        next_anchor_tokens: None without one.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.reset()

    def reset(self) -> None:
        """Start a text, with its beginning as anchor."""
        self.anchor, self.next_anchor = KDAState(), KDAState()
        self.log: Tensor | None = None
        self.num_logged: int | None = 0
        self.next_anchor_tokens: int | None = None

    def drop(self) -> None:
        """Keep nothing: no token can be removed."""
        self.reset()
        self.num_logged = None

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens of the log."""
        assert self.num_logged is not None
        self.num_logged -= count
        if self.next_anchor_tokens is not None and self.next_anchor_tokens > self.num_logged:
            self.next_anchor, self.next_anchor_tokens = KDAState(), None

    def keep(self, state: KDAState) -> None:
        """Make a copy of `state` the anchor, with an empty log."""
        self.anchor, self.num_logged = state.map(Tensor.clone), 0
        self.next_anchor, self.next_anchor_tokens = KDAState(), None

    def logged(self) -> Tensor | None:
        """[B, num_logged, X], or None if there is none."""
        return self.log[:, : self.num_logged] if self.log is not None and self.num_logged else None

    def append(self, x: Tensor) -> None:
        """Put inputs [B, .., X] behind the log."""
        old, log = self.logged(), self.log
        start = self.num_logged or 0
        self.num_logged = end = start + x.shape[1]
        if needs_grad(x, old):
            self.log = x if old is None else torch.cat([old, x], dim=1)
            return
        capacity = max(end, 2 * self.tokens, 0 if log is None else log.shape[1])
        shape = (x.shape[0], capacity, x.shape[2])
        if log is None or log.shape != shape or log.dtype != x.dtype or not may_write(log):
            log = x.new_zeros(shape)
            if old is not None:
                log[:, :start] = old
        log[:, start:end] = x.detach()
        self.log = log

    def reserve(self, num_tokens: int) -> None:
        """Give the log `num_tokens` places more than one that steps of one token need, for steps of
        up to half as many: it is then never too full for the copy that becomes the anchor."""
        old, capacity = self.logged(), 2 * self.tokens + num_tokens
        assert self.log is not None
        if self.log.shape[1] < capacity:
            self.log = self.log.new_zeros(self.log.shape[0], capacity, self.log.shape[2])
            if old is not None:
                self.log[:, : old.shape[1]] = old

    def has_room(self, num_tokens: int) -> bool:
        """Whether the log takes more tokens in place."""
        if self.log is None or self.num_logged is None:
            return False
        return self.num_logged + num_tokens <= self.log.shape[1]

    def is_due(self, num_tokens: int) -> bool:
        """Whether `move_anchor` has work before a decode step of `num_tokens` tokens."""
        if not self.tokens:
            return False
        is_full = self.log is not None and not self.has_room(num_tokens)
        return is_full or self._is_half_full

    @property
    def _is_half_full(self) -> bool:
        return self.next_anchor_tokens is None and (self.num_logged or 0) >= self.tokens

    def move_anchor(self, state: KDAState, num_tokens: int) -> None:
        """Let recorded steps go on, which cannot read the log again: copy the state when the log is
        half full; when it has no place for `num_tokens` more, that copy becomes the anchor and what
        lies behind it the log."""
        logged, kept = self.num_logged or 0, self.next_anchor_tokens
        if self.log is not None and not self.has_room(num_tokens):
            if kept is None or logged - kept < self.tokens:
                return  # the layers themselves have to read the log again
            rest = self.log[:, kept:logged].clone()
            if not may_write(self.log):
                self.log = torch.empty_like(self.log)
            self.log[:, : logged - kept] = rest
            self.anchor, self.num_logged = self.next_anchor, logged - kept
            self.next_anchor, self.next_anchor_tokens = KDAState(), None
        if self._is_half_full:
            self.next_anchor, self.next_anchor_tokens = state.map(Tensor.clone), self.num_logged

    def map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by what `function` makes of it."""
        self.anchor, self.next_anchor = self.anchor.map(function), self.next_anchor.map(function)
        self.log = None if self.log is None else function(self.log)

    def tensors(self) -> list[Tensor]:
        """The tensors that are not None."""
        own = self.anchor.tensors() + self.next_anchor.tensors()
        return own if self.log is None else [*own, self.log]
