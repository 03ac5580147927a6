"""KDA states and latents of many texts, each of its own length.

A text has a row of every KDA layer's states and, for its latents, pages of so many tokens, which
all MLA layers cut alike. Texts come and go without moving each other; a page belongs to all
texts that begin with the same tokens. What reads and writes it is the decode step, which finds rows
and pages through tables on the device (`decode/addresses.py`); a text is read into a cache of its
own first. What a step has read of a text can be taken back until the next one, if the pool keeps
updates of states apart so long (`pending.py`).

Shapes: N rows, P pages of G tokens, H heads, K key and value size, W convolution width, R latent
width.
"""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.cache.hybrid import check_one_text
from kimi_linear.cache.pending import STEP_TOKENS, PendingUpdates
from kimi_linear.cache.state import KDAState
from kimi_linear.ops.runtime import ceil_div

PAGE_TOKENS = 256
# Kernels read so many tokens at once, from one page.
PAGE_UNIT = 32


class TextPool:
    """Rows and pages, handed out and taken back.

    One row and one page more than asked for are never handed out: steps whose number of rows is
    rounded up write there.

    Args:
        config: The model's.
        num_rows: Texts at a time.
        num_pages: Of all texts together.
        dtype, device: The model's.
        page_tokens: G, a multiple of 32.
        rollback_tokens: Of a step and text, at most, if `crop` is to take them back; 0: it cannot.

    Raises:
        ValueError: If a number is not allowed.

    Attributes:
        states: Of KDA layers, by their number: [N + 1, ..].
        latents: Of MLA layers, by their number: [P + 1, G, R].
        pages: int32 [N + 1, P] on the device: each row's pages, in order.
        updates: Of KDA layers, by their number, what `states` have not taken in, of N + 1 rows;
            empty without `rollback_tokens`.
        lengths: Tokens of each row; 0 of those that are free.
        pending: Of them, the last ones, which `crop` can remove.
    """

    def __init__(
        self,
        config: Any,
        num_rows: int,
        num_pages: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        page_tokens: int = PAGE_TOKENS,
        rollback_tokens: int = 0,
    ) -> None:
        for name, value in {"num_rows": num_rows, "num_pages": num_pages}.items():
            if value < 1:
                raise ValueError(f"{name}={value} is not allowed: it must be at least 1")
        if page_tokens < PAGE_UNIT or page_tokens % PAGE_UNIT:
            raise ValueError(
                f"page_tokens={page_tokens} is not allowed: it must be a multiple of {PAGE_UNIT}"
            )
        if not 0 <= rollback_tokens <= STEP_TOKENS:
            raise ValueError(
                f"rollback_tokens={rollback_tokens} is not allowed: it must be from 0 to "
                f"{STEP_TOKENS}"
            )
        self.page_tokens, self.rollback_tokens = page_tokens, rollback_tokens
        linear = config.linear_attn_config
        heads, size = linear["num_heads"], linear["head_dim"]
        conv = num_rows + 1, 3, heads * size, linear["short_conv_kernel_size"] - 1
        page = page_tokens, config.kv_lora_rank + config.qk_rope_head_dim
        self.num_rows, self.num_pages = num_rows, num_pages
        self.states: dict[int, KDAState] = {}
        self.latents: dict[int, Tensor] = {}
        self.updates: dict[int, PendingUpdates] = {}
        with torch.inference_mode(False):  # made in it, they could not be written to outside of it
            for i, kind in enumerate(config.layer_types):
                if kind == "linear_attention":
                    shape = num_rows + 1, heads, size, size
                    self.states[i] = KDAState(
                        torch.zeros(conv, dtype=dtype, device=device),
                        torch.zeros(shape, dtype=torch.float32, device=device),
                    )
                    if rollback_tokens:
                        self.updates[i] = PendingUpdates()
                        self.updates[i].reserve(self.states[i], rollback_tokens)
                else:
                    self.latents[i] = torch.zeros(num_pages + 1, *page, dtype=dtype, device=device)
            self.pages = torch.full(
                (num_rows + 1, num_pages), num_pages, dtype=torch.int32, device=device
            )
        self.lengths, self.pending = [0] * num_rows, [0] * num_rows
        self._own_pages: list[list[int]] = [[] for _ in range(num_rows)]
        self._free_rows = list(range(num_rows))[::-1]
        self._free_pages = list(range(num_pages))[::-1]
        self._uses = [0] * num_pages

    @property
    def num_free_rows(self) -> int:
        """Texts that can still come."""
        return len(self._free_rows)

    @property
    def num_free_pages(self) -> int:
        """Pages that no text has."""
        return len(self._free_pages)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return ceil_div(num_tokens, self.page_tokens)

    @staticmethod
    def bytes_of(
        config: Any, page_tokens: int, dtype: torch.dtype, rollback_tokens: int = 0
    ) -> tuple[int, int]:
        """What a row and a page take, of all layers together."""
        place: Any = {"dtype": dtype, "device": torch.device("meta"), "page_tokens": page_tokens}
        held = TextPool(config, 1, 1, rollback_tokens=rollback_tokens, **place).memory_bytes()
        return held["linear_attention"] // 2, held["full_attention"] // 2  # one is spare

    def add(self, cache: Any, *, like: int | None = None) -> int:
        """Take a text over from a cache that has read it, and return its row here.

        Args:
            cache: A `KimiLinearCache` of one row without padding; its text stays what it is.
            like: A row here whose text begins with the same tokens: whole pages are shared.

        Raises:
            ValueError: For a cache of several rows, or with padding.
            RuntimeError: If there is no row, or not enough pages.
        """
        check_one_text(cache, "cache")
        num_tokens = cache.get_seq_length()
        shared = [] if like is None else self._whole_pages(like, num_tokens)
        own = self._begin(num_tokens, shared)
        try:
            self._copy(cache, own, len(shared))
        except Exception:  # any kind, of memory for instance: it has no text
            self.free(own)
            raise
        return own

    def _copy(self, cache: Any, own: int, num_shared: int) -> None:
        """Copy a cache's text to a row, but for the pages that it shares."""
        for i, layer in enumerate(cache.layers):
            if i in self.latents:
                text = torch.cat([x[0] for x in layer.segments()])
                self._write(text, self.latents[i], own, num_shared)
                continue
            layer.settle()
            tensors = self.states[i].tensors(), layer.state.tensors()
            for target, source in zip(*tensors, strict=True):
                target[own] = source[0]

    def _begin(self, num_tokens: int, shared: list[int]) -> int:
        """A row for a text of so many tokens, whose first pages are those of another."""
        if not self._free_rows:
            raise RuntimeError(f"all {self.num_rows} rows of the pool are taken")
        missing = self.pages_for(num_tokens) - len(shared)
        if missing > len(self._free_pages):
            raise RuntimeError(
                f"a text of {num_tokens} tokens needs {missing} pages of {self.page_tokens} "
                f"tokens, and {len(self._free_pages)} of the pool's {self.num_pages} are free"
            )
        own = self._free_rows.pop()
        for page in shared:
            self._uses[page] += 1
        self._own_pages[own] = [*shared, *(self._take_page() for _ in range(missing))]
        self.lengths[own] = num_tokens
        self._tell(own, 0)
        return own

    def _write(self, text: Tensor, latents: Tensor, own: int, num_shared: int) -> None:
        """Copy a layer's latents [tokens, R] behind a row's first, shared pages."""
        pieces = text[num_shared * self.page_tokens :].split(self.page_tokens)
        for page, piece in zip(self._own_pages[own][num_shared:], pieces, strict=True):
            latents[page, : len(piece)] = piece

    def grow(self, row: int, num_tokens: int) -> bool:
        """Make room for more tokens behind a text; False, and nothing is changed, if there are not
        enough pages."""
        own = self._own_pages[row]
        before, missing = len(own), self.missing_pages(row, num_tokens)
        if missing > len(self._free_pages):
            return False
        if missing > 0:
            own += [self._take_page() for _ in range(missing)]
            self._tell(row, before)
        return True

    def missing_pages(self, row: int, num_tokens: int) -> int:
        """Pages that a text needs for more tokens, besides its own."""
        needed = self.pages_for(self.lengths[row] + num_tokens)
        return max(0, needed - len(self._own_pages[row]))

    def count(self, row: int, num_tokens: int) -> None:
        """Count tokens that a step has written behind a text."""
        self.lengths[row] += num_tokens
        self.pending[row] = num_tokens if self.rollback_tokens else 0

    def crop(self, row: int, num_tokens: int) -> None:
        """Remove a text's last tokens, which its last step has read. Its pages stay its own.

        Raises:
            ValueError: If they are not the last step's.
        """
        if not 0 <= num_tokens <= self.pending[row]:
            raise ValueError(
                f"num_tokens={num_tokens} is not allowed: it must be from 0 to "
                f"{self.pending[row]}, tokens of the text's last step "
                f"(rollback_tokens={self.rollback_tokens})"
            )
        self.lengths[row] -= num_tokens
        self.pending[row] -= num_tokens

    def free(self, row: int) -> None:
        """Give back a text's row and its pages; those that others share stay."""
        for page in self._own_pages[row]:
            self._uses[page] -= 1
            if not self._uses[page]:
                self._free_pages.append(page)
        self._own_pages[row], self.lengths[row], self.pending[row] = [], 0, 0
        self._free_rows.append(row)

    def fork(self, row: int) -> int:
        """Another text that goes on from here; whole pages are shared."""
        num_tokens = self.lengths[row]
        shared = self._whole_pages(row, num_tokens)
        own = self._begin(num_tokens, shared)
        self.pending[own] = self.pending[row]
        last = self._own_pages[row][len(shared) :], self._own_pages[own][len(shared) :]
        for x in self._row_tensors():
            x[own] = x[row]
        for latents in self.latents.values():
            for source, target in zip(*last, strict=False):
                latents[target] = latents[source]
        return own

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held: "linear_attention" for states, "full_attention" for latents."""
        held = {"linear_attention": self._row_tensors(), "full_attention": self.latents.values()}
        return {kind: sum(x.nbytes for x in tensors) for kind, tensors in held.items()}

    def _row_tensors(self) -> list[Tensor]:
        """What has a place for each row."""
        both: list[Any] = [*self.states.values(), *self.updates.values()]
        return [x for each in both for x in each.tensors()]

    def _whole_pages(self, row: int, num_tokens: int) -> list[int]:
        """Pages of a row's first tokens that nothing will be written to: tokens that can be taken
        back may be followed by others."""
        settled = min(num_tokens, self.lengths[row] - self.pending[row])
        return self._own_pages[row][: settled // self.page_tokens]

    def _take_page(self) -> int:
        page = self._free_pages.pop()
        self._uses[page] = 1
        return page

    def _tell(self, row: int, start: int) -> None:
        """Let the device know a row's pages from the one at `start` on."""
        own = torch.tensor(self._own_pages[row][start:], dtype=torch.int32)
        self.pages[row, start : start + len(own)] = own.to(self.pages.device, non_blocking=True)
