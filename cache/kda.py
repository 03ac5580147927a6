"""The state of one KDA layer, and what is needed to take tokens back.

Shapes: B batch, T tokens of a call, H heads, K key size, V value size, D = H * K, W convolution
width, X hidden size.
"""

import copy

import torch
from kimi_linear.cache.layer import LayerCache, may_write
from kimi_linear.cache.rollback import KDAPlan
from kimi_linear.ops.runtime import needs_grad
from torch import Tensor

# What crop can take back, unless a cache is made for another number ...
ROLLBACK_TOKENS = 64
# ... and at least once Transformers announces speculative decoding by `activate_past_recording`.
SPECULATIVE_ROLLBACK_TOKENS = 256

States = tuple[Tensor | None, Tensor | None]


class KDALayerCache(LayerCache):
    """State of one KDA layer.

    Args:
        rollback_tokens: Minimum number of trailing tokens `crop` can remove; 0 disables it.

    Attributes:
        conv_state: [B, 3, D, W - 1], the last inputs of the q, k and v convolutions, oldest first;
            None if empty.
        recurrent_state: [B, H, K, V] float32; None if empty.
        anchor_conv_state, anchor_recurrent_state: The same as they were `num_logged` tokens ago;
            None at a sequence's beginning.
        log: [B, capacity, X], the layer's inputs since the anchor in its first `num_logged` places.
        num_logged: None if there is no anchor.
        next_conv_state, next_recurrent_state: The anchor to come, between decode steps: the states
            as they were after the log's first `num_next` tokens.
        num_next: None if there is none.
        is_stale: Whether tokens were taken back that the states still hold.
    """

    kind = "linear_attention"
    _tensors = (
        "recurrent_state",
        "conv_state",
        "anchor_recurrent_state",
        "anchor_conv_state",
        "next_recurrent_state",
        "next_conv_state",
        "log",
    )

    def __init__(self, rollback_tokens: int = ROLLBACK_TOKENS) -> None:
        super().__init__()
        self.rollback_tokens = rollback_tokens
        self.conv_state: Tensor | None = None
        self.recurrent_state: Tensor | None = None
        self.anchor_conv_state: Tensor | None = None
        self.anchor_recurrent_state: Tensor | None = None
        self.next_conv_state: Tensor | None = None
        self.next_recurrent_state: Tensor | None = None
        self.log: Tensor | None = None
        self.num_logged: int | None = 0
        self.num_next: int | None = None
        self.is_stale = False

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return self.rollback_tokens > 0

    def activate_past_recording(self) -> None:
        """Keep enough for speculative decoding from now on."""
        self.rollback_tokens = max(self.rollback_tokens, SPECULATIVE_ROLLBACK_TOKENS)

    def reset(self) -> None:
        super().reset()
        self.num_logged, self.num_next, self.is_stale = 0, None, False

    def check_crop(self, tokens_to_remove: int) -> int:
        left = super().check_crop(tokens_to_remove)
        oldest = self.num_tokens - (self.num_logged or 0)
        if left < oldest:
            raise ValueError(
                f"crop({tokens_to_remove}) would leave {left} of {self.num_tokens} tokens, which "
                f"is not possible: at least {oldest} must stay, since KDA states go back only as "
                f"far as rollback_tokens={self.rollback_tokens} of the cache keeps them; make it "
                "with KimiLinearCache(config, rollback_tokens=...), or keep a copy of it"
            )
        return left

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back: -n removes n, a positive number is how many stay."""
        left = self.check_crop(tokens_to_remove)
        if left == self.num_tokens:
            return
        assert self.num_logged is not None
        self.num_logged -= self.num_tokens - left
        self.num_tokens = left
        self.is_stale = True
        if self.num_next is not None and self.num_next > self.num_logged:
            self._drop_next()

    def start(self, hidden_states: Tensor, plan: KDAPlan) -> tuple[Tensor, States]:
        """What the plan's runs read [B, .., X], and the states before that."""
        if not plan.replays:
            return hidden_states, (self.conv_state, self.recurrent_state)
        anchor = (self.anchor_conv_state, self.anchor_recurrent_state)
        if not self.num_logged:
            return hidden_states, anchor
        assert self.log is not None
        past = self.log[:, : self.num_logged].to(hidden_states.dtype)
        return torch.cat([past, hidden_states], dim=1), anchor

    def fork(self) -> "KDALayerCache":
        """A copy that goes on from here by itself."""
        other = copy.copy(self)
        other._map(Tensor.clone)
        return other

    def step_table(self, num_rows: int, dtype: torch.dtype) -> list[int] | None:
        """Where a decode step finds this layer: addresses of conv state, recurrent state and log
        (0: none), and the log's row stride. None if the layer is not ready for a step in place.
        """
        conv, state = self.conv_state, self.recurrent_state
        if conv is None or state is None or self.is_stale:
            return None
        if conv.shape[0] != num_rows or conv.dtype != dtype or state.dtype != torch.float32:
            return None
        self.conv_state, self.recurrent_state = in_place(conv), in_place(state)
        addresses = [self.conv_state.data_ptr(), self.recurrent_state.data_ptr()]
        log = self.log
        if self.rollback_tokens == 0:
            self._drop_log()
            log = None
        elif log is None or log.dtype != dtype or log.shape[0] != num_rows:
            return None
        if log is not None and not (may_write(log) and self._log_has_room()):
            return None
        return addresses if log is None else [*addresses, log.data_ptr(), log.stride(0)]

    def step_tensors(self, num_rows: int) -> list[Tensor | None] | None:
        """What `step_table` depends on; None if another step in place cannot follow the last."""
        state = self.recurrent_state
        if state is None or state.shape[0] != num_rows or self.is_stale:
            return None
        if self.rollback_tokens and not self._log_has_room():
            return None
        return [self.conv_state, state, self.log]

    def _log_has_room(self) -> bool:
        if self.log is None or self.num_logged is None:
            return False
        return self.num_logged < min(self.log.shape[1], 2 * self.rollback_tokens)

    @property
    def is_anchor_due(self) -> bool:
        """Whether `move_anchor` has to be called before the next decode step."""
        if not self.rollback_tokens or self.is_stale or self.recurrent_state is None:
            return False
        is_full = self.log is not None and not self._log_has_room()
        return is_full or (self.num_next is None and self.num_logged == self.rollback_tokens)

    def move_anchor(self) -> None:
        """Between decode steps, which read no log again: keep a copy of the states where half of
        the log is used, and make it the anchor where all of it is."""
        logged, kept = self.num_logged or 0, self.num_next
        if self.log is not None and not self._log_has_room():
            if kept is None or logged - kept < self.rollback_tokens:
                return  # the layers themselves have to read the log again
            rest = self.log[:, kept:logged].clone()
            if not may_write(self.log):
                self.log = torch.empty_like(self.log)
            self.log[:, : logged - kept] = rest
            self.anchor_conv_state = self.next_conv_state
            self.anchor_recurrent_state = self.next_recurrent_state
            self.num_logged, self.num_next = logged - kept, None
        if self.num_logged == self.rollback_tokens and self.recurrent_state is not None:
            assert self.conv_state is not None
            self.next_conv_state = self.conv_state.clone()
            self.next_recurrent_state = self.recurrent_state.clone()
            self.num_next = self.num_logged

    def _drop_next(self) -> None:
        self.num_next = self.next_conv_state = self.next_recurrent_state = None

    def _drop_log(self) -> None:
        self.num_logged = self.log = None
        self.anchor_conv_state = self.anchor_recurrent_state = None
        self._drop_next()

    def count_step(self) -> None:
        """Count the token that a decode step has written."""
        self.num_tokens += 1
        if self.num_logged is not None:
            self.num_logged += 1

    def keep_anchor(self, states: States) -> None:
        """Make copies of `states` the anchor, with an empty log."""
        self.anchor_conv_state, self.anchor_recurrent_state = (
            None if x is None else x.clone() for x in states
        )
        self.num_logged = 0
        self._drop_next()

    def writable_state(self, batch_size: int) -> Tensor | None:
        """The recurrent state's tensor if the next state may be written over it."""
        state = self.recurrent_state
        if state is None or state.shape[0] != batch_size:
            return None
        return state if may_write(state) else None

    def update(  # type: ignore[override]
        self, states: States, hidden_states: Tensor, plan: KDAPlan, logged: Tensor
    ) -> None:
        """Take the states after a call.

        Args:
            states: After the last run.
            hidden_states: The call's inputs [B, T, X].
            plan: The call's plan.
            logged: What the last run read [B, .., X].
        """
        conv_state, recurrent_state = states
        self.conv_state = _overwrite(self.conv_state, conv_state)
        self.recurrent_state = _overwrite(self.recurrent_state, recurrent_state)
        if self.rollback_tokens == 0:
            self._drop_log()
        else:
            self._append(logged if plan.runs[0].makes_anchor else hidden_states)
        self.num_tokens += hidden_states.shape[1]
        self.is_stale = False
        self.is_initialized = True

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held: "linear_attention" for the states, "rollback" for anchor and log."""
        sizes = {"linear_attention": 0, "rollback": 0}
        for name, x in self._present().items():
            kind = "linear_attention" if name in ("conv_state", "recurrent_state") else "rollback"
            sizes[kind] += x.numel() * x.element_size()
        return sizes

    def _append(self, x: Tensor) -> None:
        """Put [B, .., X] behind the log."""
        start = self.num_logged or 0
        end = start + x.shape[1]
        old = None if self.log is None or start == 0 else self.log[:, :start]
        if needs_grad(x, old):
            self.log = x if old is None else torch.cat([old, x], dim=1)
        else:
            log = self.log
            shape = (x.shape[0], max(end, 2 * self.rollback_tokens), x.shape[2])
            if log is None or log.shape != shape or log.dtype != x.dtype or not may_write(log):
                log = x.new_zeros(shape)
                if old is not None:
                    log[:, :start] = old
            log[:, start:end] = x.detach()
            self.log = log
        self.num_logged = end


def in_place(x: Tensor) -> Tensor:
    """`x` if a kernel may write over it, else a copy."""
    return (
        x if may_write(x) and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
    )


def _overwrite(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """`new`, in the memory of `old` where that is possible."""
    if old is None or new is None or old is new or new.requires_grad or not may_write(old):
        return new
    same = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return old.copy_(new) if same else new
