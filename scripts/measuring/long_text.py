"""The measurements of `benchmark.py` behind long texts: decoding, and the first token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from measuring.bench import Bench, beside
from measuring.models import new_cache

# A text is read in pieces of so many tokens, unless another number is given.
DEFAULT_CHUNK = 16384


class LongText:
    """One growing text in one cache, behind which tokens are decoded at every context.

    Contexts come in rising order. Reading is timed as it goes, so that the time to the first token
    of the longest context needs no reading of its own.
    """

    def __init__(self, bench: Bench, longest: int) -> None:
        self.bench, self.longest = bench, longest
        self.chunk = bench.effort.prefill_chunk or DEFAULT_CHUNK
        self.has_failed = False
        self._begin()
        self._read_to(min(longest, 2 * self.chunk))  # a warm-up
        self._begin()

    def _begin(self) -> None:
        decoded = self.bench.effort.new_tokens * (self.bench.effort.repeats + 1)
        room = self.longest + decoded + 1024
        self.cache = new_cache(self.bench.kind, self.bench.model.config, room)
        self.text = torch.empty(1, 0, dtype=torch.long, device=self.bench.device)
        self.seconds, self.num_read = 0.0, 0

    def _read_to(self, context: int) -> None:
        """Read on up to `context` tokens; `text` then has one more, the next to be read."""
        bench, held = self.bench, self.cache.get_seq_length()
        if held == context:
            return
        if held > context:
            self._begin()
            held = 0
        ids = bench.random_ids(1, context - held)

        def read() -> Tensor:
            for piece in ids.split(self.chunk, dim=1):
                bench.effort.check_time()
                out = bench.model(piece, cache=self.cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1:].argmax(-1)

        with torch.no_grad():
            seconds, chosen = bench.timed(read)
        self.seconds += seconds
        self.num_read += ids.shape[1]
        self.text = torch.cat([self.text[:, :held], ids, chosen], dim=1)

    def _guarded(self, measure: Callable[[int], dict[str, Any]], context: int) -> dict[str, Any]:
        """Measure, unless an earlier failure left the cache half read."""
        if self.has_failed:
            raise RuntimeError("not run: reading a shorter context failed")
        self.has_failed = True
        figures = measure(context)
        self.has_failed = False
        return figures

    def decode(self, context: int) -> dict[str, Any]:
        """`generate()` of one row behind a cache of `context` tokens."""
        return self._guarded(self._decode, context)

    def first_token(self, context: int) -> dict[str, Any]:
        """Time to the first token: reading `context` tokens in pieces, and choosing the next."""
        return self._guarded(self._first_token, context)

    def _first_token(self, context: int) -> dict[str, Any]:
        # of a short text, what was decoded on the way is a large part
        if self.cache.get_seq_length() - self.num_read > context // 100:
            self._begin()
        with self.bench.memory as memory:
            self._read_to(context)
        limit = self.bench.limits.prefill(context)
        return {
            "context": context,
            "chunk": self.chunk,
            "seconds": self.seconds,
            # the others were decoded on the way, where decoding is measured too
            "tokens_read": self.num_read,
            "tokens_per_second": self.num_read / self.seconds,
            **memory.figures(self.bench.limits.cache_bytes(context)),
            "limit": limit,
            "fraction_of_limit": limit["ms"] / (1e3 * self.seconds),
        }

    def _decode(self, context: int) -> dict[str, Any]:
        bench = self.bench
        self._read_to(context)

        def run(count: int) -> Tensor:
            self.text = bench.model.generate(
                self.text,
                attention_mask=torch.ones_like(self.text),
                cache=self.cache,
                max_new_tokens=count,
                do_sample=False,
            )
            return self.text

        with bench.memory as memory:
            figures, _ = bench.per_token(run, batch=1)
        return {
            "context": context,
            **figures,
            **memory.figures(bench.limits.cache_bytes(context)),
            **beside(bench.limits.decode(context), figures, batch=1),
        }
