"""The measurements of `benchmark.py`: each gives the figures of one JSON line.

Wall time is taken between two synchronisations, after a warm-up, and is the median of the repeats.
Memory is the largest amount that tensors take up during the repeats, above what was there before
them, which is the weights; on a CPU the same of the process's resident size (Linux only).
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kimi_linear.decode.graph import has_recording
from kimi_linear.decode.prompts import MOST_TOKENS
from measuring.device import PeakMemory, synchronise
from measuring.limits import Limits
from measuring.models import new_cache
from measuring.packed import held_bytes

# No further repeat is begun after so many seconds: what is slow needs fewer of them.
REPEAT_SECONDS = 10.0
WARM_UP_TOKENS = 8
# The second call of a length records what later ones replay.
WARM_UP_CALLS = 2
COUNTED_FORWARDS = 16
ACCEPTED = (0.5, 0.75, 1.0)


class TimeLimitError(Exception):
    """The time for all measurements is spent."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        repeats: Runs per figure, after a warm-up.
        new_tokens: Tokens of the long run of `generate()`.
        prompt_length: Tokens of its prompts.
        prefill_chunk: Tokens of a call while a text is read; None: all at once, but for a
            `LongText`, which has a default of its own.
        deadline: Of `time.monotonic()`; no measurement and no piece of a text is begun after it.
    """

    repeats: int = 3
    new_tokens: int = 128
    prompt_length: int = 512
    prefill_chunk: int | None = None
    deadline: float = float("inf")

    def check_time(self) -> None:
        """Raise `TimeLimitError` after the deadline."""
        if time.monotonic() > self.deadline:
            raise TimeLimitError


class Bench:
    """One model, and how its calls are timed.

    Args:
        kind: Whose model it is, one of `measuring.models.MODELS`.
        model: In eval mode.
        limits: What the device allows this model.
        effort: How much to measure.
    """

    def __init__(self, kind: str, model: PreTrainedModel, limits: Limits, effort: Effort) -> None:
        self.kind, self.model, self.limits, self.effort = kind, model, limits, effort
        self.device = next(model.parameters()).device
        self.held_bytes = sum(map(held_bytes, model.parameters()))
        self.memory = PeakMemory(self.device)

    def random_ids(self, rows: int, count: int) -> Tensor:
        """[rows, count], the same for both models."""
        generator = torch.Generator().manual_seed(count)
        ids = torch.randint(0, self.limits.config.vocab_size, (rows, count), generator=generator)
        return ids.to(self.device)

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Wall seconds of one call, and what it returned."""
        synchronise(self.device)
        start = time.perf_counter()
        result = call()
        synchronise(self.device)
        return time.perf_counter() - start, result

    def repeat(self, measure: Callable[[], Any]) -> list[Any]:
        """Results of the repeats, at least one."""
        start = time.monotonic()
        results: list[Any] = []
        while len(results) < self.effort.repeats:
            results.append(measure())
            if time.monotonic() - start > REPEAT_SECONDS:
                break
        return results

    def prefill(self, context: int) -> dict[str, Any]:
        """Reading a text of one row, with the logits of its last token only, as `generate()` does:
        into a cache that cannot be cropped."""
        chunk = self.effort.prefill_chunk or context
        ids = self.random_ids(1, context)
        with torch.no_grad():
            for _ in range(WARM_UP_CALLS if context <= MOST_TOKENS else 1):
                self._read(ids[:, : 2 * chunk], chunk)
            with self.memory as memory:
                seconds = self.repeat(lambda: self.timed(lambda: self._read(ids, chunk))[0])
        median = statistics.median(seconds)
        limit = self.limits.prefill(context)
        return {
            "context": context,
            "chunk": chunk,
            "ms": 1e3 * median,
            "tokens_per_second": context / median,
            "repeats": len(seconds),
            **memory.figures(self.limits.cache_bytes(context)),
            "limit": limit | {"tokens_per_second": 1e3 * context / limit["ms"]},
            "fraction_of_limit": limit["ms"] / (1e3 * median),
        }

    def _read(self, ids: Tensor, chunk: int) -> None:
        cache = new_cache(self.kind, self.model.config, ids.shape[1], can_crop=False)
        for piece in ids.split(chunk, dim=1):
            self.effort.check_time()
            self.model(piece, cache=cache, use_cache=True, logits_to_keep=1)

    def generate(self, batch: int) -> dict[str, Any]:
        """`generate()` from a cache of its own.

        Time per token is the difference between a run of 1 + `new_tokens` tokens and a run of one,
        so that reading the prompt and what is done once per call drop out.
        """
        prompts = self.random_ids(batch, self.effort.prompt_length)
        mask = torch.ones_like(prompts)

        def run(count: int) -> Tensor:
            return self.model.generate(
                prompts, attention_mask=mask, max_new_tokens=count, do_sample=False
            )

        with self.memory as memory:
            figures, texts = self.per_token(run, batch)
        width = self.effort.prompt_length + self.effort.new_tokens
        limit = self.limits.decode(self.effort.prompt_length + self.effort.new_tokens // 2, batch)
        new = texts[:, self.effort.prompt_length :]
        return {
            "batch": batch,
            "prompt_length": self.effort.prompt_length,
            **figures,
            # rows that say the same need the same experts, which are fewer than the limit's
            "different_tokens": sum(len(step.unique()) for step in new.T) / new.numel(),
            **memory.figures(self.limits.cache_bytes(width, batch)),
            **beside(limit, figures, batch),
        }

    def per_token(self, run: Callable[[int], Tensor], batch: int) -> tuple[dict[str, Any], Tensor]:
        """Figures of a run of `generate()` by its number of new tokens, and the last text."""
        count = self.effort.new_tokens
        for _ in range(WARM_UP_CALLS):
            run(WARM_UP_TOKENS)
        texts: list[Tensor] = []

        def both() -> tuple[float, float]:
            short, _ = self.timed(lambda: run(1))
            long, text = self.timed(lambda: run(1 + count))
            texts[:] = [text]
            return short, long

        pairs = self.repeat(both)
        short, long = (statistics.median(times) for times in zip(*pairs, strict=True))
        if long <= short:
            raise RuntimeError(
                f"{1 + count} new tokens took no longer than one: the machine is busy, or "
                f"--new-tokens {count} are too few"
            )
        ms = 1e3 * (long - short) / count
        figures = {
            "new_tokens": count,
            "ms_per_token": ms,
            "tokens_per_second": 1e3 * batch / ms,
            "first_token_ms": 1e3 * short,
            "repeats": len(pairs),
        }
        device_ms = self._forward_ms(run, min(count, COUNTED_FORWARDS))
        if device_ms is not None:
            figures |= {"device_ms_per_token": device_ms, "host_ms_per_token": ms - device_ms}
        if self.kind == "ours" and self.device.type == "cuda":
            is_recorded = has_recording(self.model, batch)
            figures["backend"] = "graph" if is_recorded else "layer by layer"
        return figures, texts[-1]

    def _forward_ms(self, run: Callable[[int], Any], count: int) -> float | None:
        """Time of a decoding forward on the GPU; None without one, or if they cannot be counted.

        CUDA events are recorded at the beginning and the end of every forward, in a run of its own.
        A GPU that waits inside of a forward for its host is counted as busy: what is left of the
        wall time is what `generate()` adds around it. `forward` is wrapped since hooks would not
        do: with one, a step runs layer by layer, not as the graph that was recorded of it.
        """
        if self.device.type != "cuda":
            return None
        spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        forward = self.model.forward

        @functools.wraps(forward)
        def timed_forward(*args: Any, **kwargs: Any) -> Any:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            out = forward(*args, **kwargs)
            after.record()
            spans.append((before, after))
            return out

        self.model.forward = timed_forward
        try:
            run(1 + count)
        finally:
            del self.model.forward
        synchronise(self.device)
        if len(spans) != 1 + count:
            return None
        return statistics.median(before.elapsed_time(after) for before, after in spans[1:])

    def step(self, num_tokens: int) -> dict[str, Any]:
        """Calls of several tokens of one row behind a prompt, as speculative decoding makes them,
        for each of ACCEPTED: so many of all tokens but the first are kept, the others are taken
        back. Models that take nothing back keep all."""
        prompt, count = self.effort.prompt_length, self.effort.new_tokens
        text = self.random_ids(1, prompt)
        drafts = self.random_ids(count + WARM_UP_TOKENS, num_tokens).split(1)
        figures: dict[str, Any] = {}
        for accepted in ACCEPTED if self.kind == "ours" and num_tokens > 1 else (1.0,):
            kept = 1 + round(accepted * (num_tokens - 1))

            def run(kept: int = kept) -> float:
                cache = new_cache(self.kind, self.model.config, prompt + len(drafts) * num_tokens)
                self.model(text, cache=cache, use_cache=True, logits_to_keep=1)

                def call(ids: Tensor) -> None:
                    self.model(ids, cache=cache, use_cache=True)
                    if kept < num_tokens:
                        cache.crop(kept - num_tokens)

                for ids in drafts[count:]:
                    call(ids)
                return self.timed(lambda: [call(ids) for ids in drafts[:count]])[0]

            with torch.no_grad():
                ms = 1e3 * statistics.median(self.repeat(run)) / count
            figures[f"ms_at_{accepted:.0%}"] = ms
            figures[f"tokens_per_second_at_{accepted:.0%}"] = 1e3 * kept / ms
        limit = self.limits.step(prompt + count * num_tokens // 2, num_tokens)
        return {
            "tokens": num_tokens,
            "prompt_length": prompt,
            "calls": count,
            "ms": ms,  # of the last, where all are kept
            "tokens_per_second": 1e3 * num_tokens / ms,
            **figures,
            "limit": limit | {"tokens_per_second": 1e3 * num_tokens / limit["ms"]},
            "fraction_of_limit": limit["ms"] / ms,
        }

    def train(self, num_tokens: int) -> dict[str, Any]:
        """Forward, loss and backward of one packed row, without an optimiser.

        Memory holds the gradients too.
        """
        lengths = packed_lengths(num_tokens)
        self.model.train()
        step = packed_step(self.model, self.random_ids(1, num_tokens), lengths)
        step()
        self.model.zero_grad(set_to_none=True)
        with self.memory as memory:
            seconds = statistics.median(self.repeat(lambda: self.timed(step)[0]))
        limit = self.limits.train(lengths)
        return {
            "tokens": num_tokens,
            "sequences": lengths,
            "ms": 1e3 * seconds,
            "tokens_per_second": num_tokens / seconds,
            **memory.figures(limit["weight_bytes"] // 3),
            "limit": limit | {"tokens_per_second": 1e3 * num_tokens / limit["ms"]},
            "fraction_of_limit": limit["ms"] / (1e3 * seconds),
        }


def packed_step(model: Any, ids: Tensor, lengths: Sequence[int]) -> Callable[[], None]:
    """What runs a model forward, with the loss, and backward over one packed row.

    Args:
        model: In training mode.
        ids: [1, T].
        lengths: Of the row's sequences, T in all.
    """
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(ids.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()

    return step


def packed_lengths(num_tokens: int) -> list[int]:
    """Sequences of one packed row: a half, a quarter, and two eighths of its tokens."""
    lengths = [num_tokens // 2, num_tokens // 4, num_tokens // 8]
    return [*lengths, num_tokens - sum(lengths)]


def beside(limit: dict[str, Any], figures: dict[str, Any], batch: int) -> dict[str, Any]:
    """The limit of a decoding step and how much of it was reached."""
    return {
        "limit": limit | {"tokens_per_second": 1e3 * batch / limit["ms"]},
        "fraction_of_limit": limit["ms"] / figures["ms_per_token"],
    }
