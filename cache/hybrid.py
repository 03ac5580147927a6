"""The hybrid cache: a fixed-size state for each KDA layer, growing latents for each MLA layer.

A KDA layer keeps the last W - 1 inputs of its convolutions and one float32 matrix per head,
whatever the context; and, so that `crop` can take tokens back, an anchor and a log (`rollback.py`).
An MLA layer keeps R = kv_lora_rank + qk_rope_head_dim numbers per token, shared by all heads, in
buffers that grow by blocks. Both are layers of a Transformers `Cache`, so that `generate()` handles
them like any other.

Shapes: B batch, S tokens seen, T tokens of a call, R latent width, H heads, K key size, V value
size, D = H * K, W convolution width, X hidden size.
"""

import copy
from collections.abc import Callable

import torch
from kimi_linear.cache.rollback import KDAPlan
from kimi_linear.upstream import holds_tokens, is_offloading, put_layers
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

BLOCK_TOKENS = 256
# A buffer of at least so many tokens is never copied to grow: the next one goes beside it.
SEGMENT_TOKENS = 1 << 16
# What crop can take back, unless a cache is made for another number ...
ROLLBACK_TOKENS = 64
# ... and at least once Transformers announces speculative decoding by `activate_past_recording`.
SPECULATIVE_ROLLBACK_TOKENS = 256

States = tuple[Tensor | None, Tensor | None]


class _LayerCache(CacheLayerMixin):
    """What both kinds share: they count tokens and select rows of their tensors.

    Attributes:
        kind: Its entry of `config.layer_types`.
        num_tokens: S, padding included.
        has_padding: Whether some of them may be padding.
    """

    is_sliding = False
    supports_early_init = False
    kind = ""
    _tensors: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0
        self.has_padding = False

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        for name in self._tensors:
            setattr(self, name, None)
        self.num_tokens = 0
        self.has_padding = False
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def check_crop(self, tokens_to_remove: int) -> int:
        """Tokens left by `crop(tokens_to_remove)`; ValueError if it is not possible."""
        tokens_to_remove = int(tokens_to_remove)  # Transformers 5.17 hands over a tensor
        if tokens_to_remove > 0:
            return min(tokens_to_remove, self.num_tokens)
        left = self.num_tokens + tokens_to_remove
        if left < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not possible: the cache holds {self.num_tokens} "
                "tokens"
            )
        return left

    @property
    def num_rows(self) -> int | None:
        """B, or None while empty."""
        return next((x.shape[0] for x in self._present().values()), None)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the tensors that this layer holds, by purpose."""
        raise NotImplementedError

    def _present(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in self._tensors}
        return {name: x for name, x in tensors.items() if x is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for name, x in self._present().items():
            setattr(self, name, function(x))


class KDALayerCache(_LayerCache):
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
        self.conv_state, self.recurrent_state = _in_place(conv), _in_place(state)
        addresses = [self.conv_state.data_ptr(), self.recurrent_state.data_ptr()]
        log = self.log
        if self.rollback_tokens == 0:
            self._drop_log()
            log = None
        elif log is None or log.dtype != dtype or log.shape[0] != num_rows:
            return None
        if log is not None and not (_may_write(log) and self._log_has_room()):
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
            if not _may_write(self.log):
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
        return state if _may_write(state) else None

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
        if _records(x, old):
            self.log = x if old is None else torch.cat([old, x], dim=1)
        else:
            log = self.log
            shape = (x.shape[0], max(end, 2 * self.rollback_tokens), x.shape[2])
            if log is None or log.shape != shape or log.dtype != x.dtype or not _may_write(log):
                log = x.new_zeros(shape)
                if old is not None:
                    log[:, :start] = old
            log[:, start:end] = x.detach()
            self.log = log
        self.num_logged = end


class LatentLayerCache(_LayerCache):
    """Latents of one MLA layer.

    They lie in segments, in order. All but the last are full and never written again, so that
    other caches may read them too; one with a single row serves all rows.

    Args:
        reserve_tokens: Room for so many tokens is made at once; more is made when it is needed.
        offload: Keep the latents in the CPU's memory; attention fetches them block by block.

    Attributes:
        full: [B or 1, n, R] each.
        tail: [B, capacity, R], the last segment, used up to `num_tokens`; None if there is none.
        num_shared: Of the first so many tokens none may be written again in place.
    """

    is_croppable = True
    kind = "full_attention"
    _tensors = ("tail",)

    def __init__(self, reserve_tokens: int = 0, offload: bool = False) -> None:
        super().__init__()
        self.reserve_tokens, self.offload_latents = reserve_tokens, offload
        self.full: list[Tensor] = []
        self.tail: Tensor | None = None
        self.num_shared = 0
        self._num_rows: int | None = None

    @property
    def num_rows(self) -> int | None:
        return self._num_rows

    @property
    def num_full(self) -> int:
        """Tokens in full segments."""
        return sum(segment.shape[1] for segment in self.full)

    def reset(self) -> None:
        super().reset()
        self.full, self.num_shared, self._num_rows = [], 0, None

    def segments(self) -> list[Tensor]:
        """All tokens' latents, [B or 1, n, R] each."""
        used = self.num_tokens - self.num_full
        return [*self.full, self.tail[:, :used]] if self.tail is not None and used else self.full

    def update(self, latent: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Append [B, T, R] and return all segments."""
        self._num_rows = latent.shape[0]
        used = self.num_tokens - self.num_full
        if _records(latent, self.tail):  # a buffer written in place would break autograd
            self.tail = latent if not used else torch.cat([self._used(used), latent], dim=1)
            self.num_tokens += latent.shape[1]
            self.is_initialized = True
            return self.segments()
        latent = latent.detach()
        if self.offload_latents:
            latent = latent.cpu()
        room = 0 if self.tail is None else self.tail.shape[1] - used
        if room < latent.shape[1] and used + room >= SEGMENT_TOKENS:
            if room:
                self._write(latent[:, :room], used)
            self.full = self.segments()
            latent, self.tail, used = latent[:, room:], None, 0
        self._write(latent, used)
        self.is_initialized = True
        return self.segments()

    def step_table(self, num_rows: int, dtype: torch.dtype) -> list[int] | None:
        """Where a decode step finds this layer: address, tokens and row stride of all but the last
        segment, which are made one, then address and row stride of the last one, which has room.
        None if the layer is not ready for a step in place.
        """
        if self._num_rows != num_rows or self.offload_latents:
            return None
        if any(x.dtype != dtype for x in (*self.full, self.tail) if x is not None):
            return None
        used = self.num_tokens - self.num_full
        if self.tail is not None and used == self.tail.shape[1] >= SEGMENT_TOKENS:
            self.full, self.tail, used = self.segments(), None, 0
        if len(self.full) > 1:
            rows = max(x.shape[0] for x in self.full)
            self.full = [torch.cat([x.expand(rows, -1, -1) for x in self.full], dim=1)]
        last = self.full[-1] if self.tail is None else self.tail
        self.tail = self._reserved(last[:, :1].expand(num_rows, -1, -1), used)
        row = [0, 0, 0, self.tail.data_ptr(), self.tail.stride(0)]
        if self.full:
            prefix = self.full[0]
            stride = prefix.stride(0) if prefix.shape[0] == num_rows else 0
            row[:3] = [prefix.data_ptr(), prefix.shape[1], stride]
        return row

    def step_tensors(self, num_rows: int) -> list[Tensor | None] | None:
        """What `step_table` depends on; None if another step in place cannot follow the last."""
        tail = self.tail
        if tail is None or num_rows != self._num_rows or self.num_tokens < self.num_shared:
            return None
        has_room = self.num_tokens - self.num_full < tail.shape[1]
        return [*self.full, tail] if has_room else None

    def count_step(self) -> None:
        """Count the token that a decode step has written."""
        self.num_tokens += 1

    def fill(self, segments: list[Tensor], num_rows: int) -> None:
        """Hold these latents [B or 1, n, R] for `num_rows` rows, and nothing else."""
        self.reset()
        self.full, self._num_rows = segments, num_rows
        self.num_tokens = self.num_full

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back: -n removes n, a positive number is how many stay."""
        self.num_tokens = self.check_crop(tokens_to_remove)
        while self.full and self.num_full >= self.num_tokens:
            last = self.full.pop()
            self.tail = last if self.num_full < self.num_tokens else None

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)], len(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0), (self._num_rows or 0) * repeats)

    def fork(self) -> "LatentLayerCache":
        """A cache that goes on from here by itself and reads the same memory up to here."""
        other = copy.copy(self)
        other.full, other.tail = list(self.segments()), None
        self.num_shared = other.num_shared = self.num_tokens
        return other

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held; what is shared with other caches is counted in each."""
        tensors = self.full if self.tail is None else [*self.full, self.tail]
        return {"full_attention": sum(x.numel() * x.element_size() for x in tensors)}

    def _select(self, function: Callable[[Tensor], Tensor], num_rows: int) -> None:
        """Make `num_rows` rows. A single one is not copied: all others go on from it."""
        if self._num_rows is None or self._num_rows == num_rows == 1:
            return
        if self._num_rows == 1:
            self.full, self.tail = list(self.segments()), None
            self.num_shared = self.num_tokens
        else:
            self.full = [x if x.shape[0] == 1 else function(x) for x in self.full]
            if self.tail is not None:
                self.tail = function(self.tail.expand(self._num_rows, -1, -1))
                self.num_shared = min(self.num_shared, self.num_full)
        self._num_rows = num_rows

    def _used(self, used: int) -> Tensor:
        assert self.tail is not None and self._num_rows is not None
        return self.tail[:, :used].expand(self._num_rows, -1, -1)

    def _write(self, latent: Tensor, used: int) -> None:
        """Put [B, .., R] into the tail behind its first `used` places."""
        self.tail = self._reserved(latent, used)
        self.tail[:, used : used + latent.shape[1]] = latent
        self.num_tokens += latent.shape[1]

    def _reserved(self, latent: Tensor, used: int) -> Tensor:
        """A tail that may be written behind its first `used` places, which keep their content."""
        needed = used + latent.shape[1]
        tail = self.tail
        if (
            tail is not None
            and tail.shape[0] == latent.shape[0]
            and tail.shape[1] >= needed
            and self.num_tokens >= self.num_shared
            and _may_write(tail)
        ):
            return tail
        needed = max(needed, self.reserve_tokens - self.num_full)
        capacity = -(-needed // BLOCK_TOKENS) * BLOCK_TOKENS
        pinned = self.offload_latents and torch.cuda.is_available()
        grown = torch.zeros(
            latent.shape[0],
            capacity,
            latent.shape[2],
            dtype=latent.dtype,
            device=latent.device,
            pin_memory=pinned,
        )
        if used:
            grown[:, :used] = self._used(used)
        self.num_shared = min(self.num_shared, self.num_full)
        return grown


class KimiLinearCache(Cache):
    """Cache of a Kimi Linear model, one layer of the fitting kind per decoder layer.

    Args:
        config: A `KimiLinearConfig`; only its `layer_types` are read.
        rollback_tokens: At least so many of the last tokens can be taken back by `crop`;
            `rollback.py` says what that costs. 0: none, and no cost.
        reserve_tokens: Room for the latents of so many tokens is made at once.
        offload: Keep latents in the CPU's memory; attention fetches them block by block.

    Raises:
        ValueError: If a number is negative.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        rollback_tokens: int = ROLLBACK_TOKENS,
        reserve_tokens: int = 0,
        offload: bool = False,
    ) -> None:
        numbers = {"rollback_tokens": rollback_tokens, "reserve_tokens": reserve_tokens}
        for name, value in numbers.items():
            if value < 0:
                raise ValueError(f"{name}={value} is not allowed: it must be at least 0")
        layers = _layers_for(config, rollback_tokens, reserve_tokens, offload)
        Cache.__init__(self, layers=layers)  # subclasses are another cache of Transformers too

    num_reorders = 0  # since it was made, so that a beam search that does not is found out
    is_torn = False  # between the first write of a call and its end

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows into the order of `beam_idx` [B]."""
        super().reorder_cache(beam_idx)
        self.num_reorders += 1

    def cache_memory(self) -> dict[str, int]:
        """Bytes held, see the function `cache_memory`."""
        return cache_memory(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back, in all layers or in none.

        Args:
            tokens_to_remove: -n removes n tokens, as in Transformers; a positive number is how many
                stay, as in older versions; 0 does nothing.

        Raises:
            ValueError: If the KDA layers cannot go back so far, or an error ended the call before.
        """
        if tokens_to_remove == 0:
            return
        check_whole(self)
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.is_torn = False

    def copy(self) -> "KimiLinearCache":
        """An independent copy, all memory included."""
        return copy.deepcopy(self)

    def fork(self) -> "KimiLinearCache":
        """A cache that goes on from here by itself.

        KDA states are copied; the latents up to here are shared, and copied by whoever crops into
        them and goes on.
        """
        other = copy.copy(self)
        other.layers = [layer.fork() for layer in self.layers]
        return other


class KimiLinearDynamicCache(KimiLinearCache, DynamicCache):
    """A `KimiLinearCache` that is known as a `DynamicCache`: `generate()` makes it, and a
    `DynamicCache` becomes it when a Kimi Linear model writes to it."""


def cache_memory(cache: Cache) -> dict[str, int]:
    """Bytes that a cache of ours holds, by purpose.

    Returns:
        "linear_attention": KDA states (fixed); "full_attention": latents (growing by token);
        "rollback": what `crop` needs (bounded).
    """
    total = {"linear_attention": 0, "full_attention": 0, "rollback": 0}
    for layer in cache.layers:
        for kind, size in layer.memory_bytes().items():
            total[kind] += size
    return total


def check_whole(cache: Cache) -> None:
    """ValueError if a call that an exception ended has written to the cache."""
    if getattr(cache, "is_torn", False):
        raise ValueError(
            "cache holds a part of a call that an error ended, which is not allowed: start from a "
            "copy, or reset() it"
        )


def check_kinds(cache: Cache, config: PreTrainedConfig) -> None:
    """ValueError unless a cache of ours has a layer of the right kind for each of the model's."""
    kinds, needed = [layer.kind for layer in cache.layers], config.layer_types
    if kinds == needed:
        return
    if len(kinds) != len(needed):
        raise ValueError(
            f"cache has {len(kinds)} layers, which is not allowed: it must have "
            f"num_hidden_layers={len(needed)}"
        )
    i = next(i for i, kind in enumerate(needed) if kind != kinds[i])
    raise ValueError(
        f"cache.layers[{i}] is one of {kinds[i]}, which is not allowed: it must be one of "
        f"{needed[i]}, as the model's layer is"
    )


def prepare_cache(cache: Cache | None, config: PreTrainedConfig) -> Cache:
    """A cache with layers of ours: a new one for None, the given one if it is ours or still empty.

    Raises:
        ValueError: If another cache already holds tokens, or is of a kind that our layers cannot
            stand in for, or if its layers are not the model's kinds or do not hold equally many
            tokens.
    """
    if cache is None:
        return KimiLinearCache(config)
    layers = getattr(cache, "layers", [])
    if layers and all(hasattr(layer, "memory_bytes") for layer in layers):
        check_kinds(cache, config)
        check_whole(cache)
        counts = {layer.num_tokens for layer in layers}
        if len(counts) > 1:
            raise ValueError(
                f"cache has layers of {min(counts)} and of {max(counts)} tokens, which "
                "is not allowed: an error ended the call before; start from a copy, or reset() it"
            )
        return cache
    name = type(cache).__name__
    if name != "DynamicCache":
        raise ValueError(
            f"cache={name} is not supported: it must be a KimiLinearCache, "
            "a DynamicCache or None; KimiLinearCache(config, reserve_tokens=...) makes room in "
            "advance, as generate(cache_implementation='static') does"
        )
    if holds_tokens(cache):
        raise ValueError(
            f"cache={name} holds tokens that this model did not write: it must be empty (PEFT's "
            "prefix tuning puts keys and values there, which this model's cache has no place for: "
            "use another kind of adapter)"
        )
    put_layers(cache, _layers_for(config, ROLLBACK_TOKENS, 0, is_offloading(cache)))
    cache.__class__ = KimiLinearDynamicCache
    return cache


def _layers_for(
    config: PreTrainedConfig, rollback_tokens: int, reserve_tokens: int, offload: bool
) -> list[_LayerCache]:
    return [
        KDALayerCache(rollback_tokens)
        if kind == "linear_attention"
        else LatentLayerCache(reserve_tokens, offload)
        for kind in config.layer_types
    ]


def _may_write(x: Tensor) -> bool:
    """Whether `x` may be written in place: it is in no graph, and not made by inference_mode."""
    return not x.requires_grad and (not x.is_inference() or torch.is_inference_mode_enabled())


def _in_place(x: Tensor) -> Tensor:
    """`x` if a kernel may write over it, else a copy."""
    return (
        x if _may_write(x) and x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)
    )


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _overwrite(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    """`new`, in the memory of `old` where that is possible."""
    if old is None or new is None or old is new or new.requires_grad or not _may_write(old):
        return new
    same = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return old.copy_(new) if same else new


__all__ = [
    "KDALayerCache",
    "KimiLinearCache",
    "KimiLinearDynamicCache",
    "LatentLayerCache",
    "cache_memory",
    "check_kinds",
    "check_whole",
    "prepare_cache",
]
