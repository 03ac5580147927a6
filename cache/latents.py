"""The latents of one MLA layer.

Shapes: B batch, T tokens of a call, R latent width.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from kimi_linear.cache.layer import LayerCache, may_write
from kimi_linear.ops.runtime import needs_grad

BLOCK_TOKENS = 256
# A buffer of at least this many tokens is never copied to grow: the next one goes beside it.
SEGMENT_TOKENS = 1 << 16


class LatentLayerCache(LayerCache):
    """Latents of one MLA layer.

    They lie in segments, in order. All but the last are full and never written again, so that
    other caches may read them too; one with a single row serves all rows.

    Args:
        reserve_tokens: Room for this many tokens is made at once; more is made when it is needed.
        offload: Keep the latents in the CPU's memory; attention fetches them block by block.

    Attributes:
        full: [B or 1, n, R] each.
        tail: [B, capacity, R], the last segment, used up to `num_tokens`; None if there is none.
        num_shared: The first tokens, this many, may not be written again in place.
    """

    is_croppable = True
    kind = "full_attention"

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
        self.full, self.tail, self.num_shared, self._num_rows = [], None, 0, None

    def segments(self) -> list[Tensor]:
        """All tokens' latents, [B or 1, n, R] each."""
        used = self.num_tokens - self.num_full
        return [*self.full, self.tail[:, :used]] if self.tail is not None and used else self.full

    def update(self, latent: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Append [B, T, R] and return all segments."""
        self._num_rows = latent.shape[0]
        used = self.num_tokens - self.num_full
        if needs_grad(latent, self.tail):  # a buffer written in place would break autograd
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

    def prepare_step(self, num_rows: int, num_tokens: int, dtype: torch.dtype) -> bool:
        """Make ready for a decode step that writes tokens in place: all but the last segment become
        one, and the last one has room. False if that cannot be.

        Args:
            num_rows: B.
            num_tokens: Of each row.
            dtype: The model's.
        """
        if self._num_rows != num_rows or self.offload_latents:
            return False
        if any(x.dtype != dtype for x in (*self.full, self.tail) if x is not None):
            return False
        used = self.num_tokens - self.num_full
        room = 0 if self.tail is None else self.tail.shape[1] - used
        if used >= SEGMENT_TOKENS and room < num_tokens:
            self.full, self.tail, used = self.segments(), None, 0
        if len(self.full) > 1:
            rows = max(x.shape[0] for x in self.full)
            self.full = [torch.cat([x.expand(rows, -1, -1) for x in self.full], dim=1)]
        last = self.full[-1] if self.tail is None else self.tail
        self.tail = self._reserved(last[:, :1].expand(num_rows, num_tokens, -1), used)
        return True

    def step_tensors(self, num_rows: int, num_tokens: int) -> list[Tensor | None] | None:
        """What a decode step reads and writes; None if another step in place cannot follow the
        last."""
        tail = self.tail
        if tail is None or num_rows != self._num_rows or self.num_tokens < self.num_shared:
            return None
        has_room = self.num_tokens - self.num_full + num_tokens <= tail.shape[1]
        return [*self.full, tail] if has_room else None

    def count_step(self, num_tokens: int) -> None:
        """Count the tokens of a row that a decode step has written."""
        self.num_tokens += num_tokens

    def fill(self, segments: list[Tensor], num_rows: int) -> None:
        """Hold these latents [B or 1, n, R] for `num_rows` rows, and nothing else."""
        self.reset()
        self.full, self._num_rows = segments, num_rows
        self.num_tokens = self.num_full

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens: -n removes n, a positive number is how many stay."""
        self.num_tokens = self.check_crop(tokens_to_remove)
        while self.full and self.num_full >= self.num_tokens:
            last = self.full.pop()
            self.tail = last if self.num_full < self.num_tokens else None

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)], len(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, dim=0), (self._num_rows or 0) * repeats)

    def fork(self) -> "LatentLayerCache":
        """An independent cache that continues from here and shares the memory up to here."""
        other = copy.copy(self)
        other.full, other.tail = list(self.segments()), None
        self.num_shared = other.num_shared = self.num_tokens
        return other

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held; what is shared with other caches is counted in each."""
        tensors = self.full if self.tail is None else [*self.full, self.tail]
        return {"full_attention": sum(x.numel() * x.element_size() for x in tensors)}

    def _select(self, function: Callable[[Tensor], Tensor], num_rows: int) -> None:
        """Make `num_rows` rows. A single one is not copied: all rows continue from it."""
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

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        self.full = [function(x) for x in self.full]
        self.tail = None if self.tail is None else function(self.tail)

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
            and may_write(tail)
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
