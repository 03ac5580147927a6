"""Where the texts of many requests decode: in a pool, or each with a cache of its own."""

import math
from typing import Any

import torch
from torch import Tensor

from kimi_linear.cache.pool import TextPool
from kimi_linear.decode.graph import decode_pool, record_pool
from kimi_linear.ops.runtime import power_of_two


class OwnCaches:
    """Texts that decode layer by layer, each with its cache.

    Args:
        model: A `KimiLinearForCausalLM`.
        num_rows: Texts at a time, beside a prefix.

    Attributes:
        steps_ahead: How many a device is given to do while the host launches a reading.
    """

    steps_ahead = 0

    def __init__(self, model: Any, num_rows: int) -> None:
        self.model, self.num_rows = model, num_rows
        self.caches: dict[int, Any] = {}

    def warm_up(self) -> None:
        """Do before the first step what would keep texts waiting later.

        Raises:
            torch.OutOfMemoryError: Once all that there is memory for is done.
        """

    def most_tokens(self) -> float:
        """The longest text that can be held."""
        return math.inf

    def can_hold(self, lengths: list[int]) -> bool:
        """Whether texts of these lengths can be held if there is nothing else."""
        return True

    def has_room(self, lengths: list[int]) -> bool:
        """Whether texts of these lengths can be held now, beside those that are."""
        return len(lengths) <= self.num_rows + 1 - len(self.caches)

    def add(self, cache: Any, like: int | None = None) -> int:
        """Take a text over, and return its row here.

        Args:
            cache: Has read it, and it alone.
            like: A row here whose text begins with the same tokens.
        """
        own = min(set(range(self.num_rows + 1)) - set(self.caches))
        self.caches[own] = cache
        return own

    def fork(self, row: int) -> int:
        """Another text that goes on from here."""
        return self.add(self.caches[row].fork())

    def free(self, row: int) -> None:
        """Forget a text."""
        del self.caches[row]

    def grow(self, rows: list[int], num_tokens: int) -> bool:
        """Make room for so many tokens more of each text; False, and nothing is changed, if there
        is none for all."""
        return True

    def crop(self, row: int, num_tokens: int) -> None:
        """Remove the last tokens of a text's last step; here there is nothing to remove."""

    def step(self, rows: list[int], ids: Tensor) -> Tensor | None:
        """Logits [texts, T, vocab_size] of more tokens of each text, ids [texts, T]; None: the
        model has changed, and its texts must be elsewhere."""
        count, num_tokens = ids.shape
        out = self.model.model(
            input_ids=ids.reshape(1, -1),
            cu_seq_lens_q=torch.arange(count + 1) * num_tokens,
            cache=[self.caches[row] for row in rows],
        )
        return self.model.lm_head(out.last_hidden_state[0]).unflatten(0, (count, num_tokens))


class PooledTexts:
    """Texts of a pool, which decode together by recorded steps; as `OwnCaches`.

    Args:
        model: A `KimiLinearForCausalLM` that `pool_obstacle` has nothing against.
        num_rows: Texts at a time, at most, beside a prefix.
        num_pages: Of all texts together; None: as many as memory has room for.
        page_tokens: Tokens of a page.
        memory_share: Of the free memory, for rows and pages.
        rollback_tokens: See `TextPool`.
    """

    steps_ahead = 2

    def __init__(
        self,
        model: Any,
        num_rows: int,
        num_pages: int | None,
        page_tokens: int,
        memory_share: float,
        rollback_tokens: int = 0,
    ) -> None:
        self.model = model
        if num_pages is None or model.device.type == "cuda":
            row, page = TextPool.bytes_of(model.config, page_tokens, model.dtype, rollback_tokens)
            torch.cuda.empty_cache()  # what torch holds and does not use is free too
            free = memory_share * torch.cuda.mem_get_info(model.device)[0]
            # states take at most half of it
            num_rows = max(1, min(num_rows, int(free / 2 // row) - 2))
            most_pages = max(1, int((free - (num_rows + 2) * row) // page) - 1)
            num_pages = most_pages if num_pages is None else num_pages
        assert num_pages is not None
        self.num_rows, self.made_for = num_rows, (model.dtype, model.device)
        self.pool = TextPool(
            model.config,
            num_rows + 1,
            num_pages,
            dtype=model.dtype,
            device=model.device,
            page_tokens=page_tokens,
            rollback_tokens=rollback_tokens,
        )

    def warm_up(self) -> None:
        size, lacking = power_of_two(self.num_rows), None
        while size and self.made_for == (self.model.dtype, self.model.device):
            try:
                record_pool(self.model, self.pool, size)
            except torch.OutOfMemoryError as error:
                lacking = error.with_traceback(None)  # whose frames hold memory
            size //= 2
        if lacking is not None:
            raise lacking

    def most_tokens(self) -> float:
        return self.pool.num_pages * self.pool.page_tokens

    def can_hold(self, lengths: list[int]) -> bool:
        return sum(map(self.pool.pages_for, lengths)) <= self.pool.num_pages

    def has_room(self, lengths: list[int]) -> bool:
        pages = sum(map(self.pool.pages_for, lengths))
        return len(lengths) <= self.pool.num_free_rows and pages <= self.pool.num_free_pages

    def add(self, cache: Any, like: int | None = None) -> int:
        return self.pool.add(cache, like=like)

    def fork(self, row: int) -> int:
        return self.pool.fork(row)

    def free(self, row: int) -> None:
        self.pool.free(row)

    def grow(self, rows: list[int], num_tokens: int) -> bool:
        missing = sum(self.pool.missing_pages(row, num_tokens) for row in rows)
        return missing <= self.pool.num_free_pages and all(
            self.pool.grow(row, num_tokens) for row in rows
        )

    def crop(self, row: int, num_tokens: int) -> None:
        self.pool.crop(row, num_tokens)

    def step(self, rows: list[int], ids: Tensor) -> Tensor | None:
        if self.made_for != (self.model.dtype, self.model.device):
            return None
        return decode_pool(self.model, self.pool, rows, ids)
