"""Many requests at once, for `benchmark.py`: prompts and answers of different lengths, in no more
rows than a number, beside what a full batch of that many rows decodes."""

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from measuring.bench import Bench

# Requests that arrive, one after the other, while all rows but one decode.
LATE_REQUESTS = 5
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Workload:
    """What is asked.

    Attributes:
        count: Requests, all at the beginning.
        prompts, answers: Fewest and most tokens; between them, all lengths are as likely.
    """

    count: int = 256
    prompts: tuple[int, int] = (64, 2048)
    answers: tuple[int, int] = (16, 512)


class Requests:
    """The measurement of one model.

    Args:
        bench: The model.
        workload: What is asked.
    """

    def __init__(self, bench: Bench, workload: Workload) -> None:
        self.bench, self.workload = bench, workload

    def requests(self, rows: int) -> dict[str, Any]:
        """All requests, in `rows` rows; then late ones beside `rows` - 1 that decode."""
        full = self.bench.generate(rows)["tokens_per_second"]
        generator = random.Random(0)
        asked = [
            (
                self._prompt(i, generator.randint(*self.workload.prompts)),
                generator.randint(*self.workload.answers),
            )
            for i in range(self.workload.count)
        ]
        with self._manager(rows) as manager:
            self._warm_up(manager, rows)
            start = time.perf_counter()
            self._answers(manager, asked)
            seconds = time.perf_counter() - start
            late = self._late(manager, rows)
        answered = sum(count for _, count in asked)
        return {
            "batch": rows,
            "requests": len(asked),
            "prompt_tokens": sum(len(prompt) for prompt, _ in asked),
            "answer_tokens": answered,
            "seconds": seconds,
            "tokens_per_second": answered / seconds,
            "full_batch_tokens_per_second": full,
            "fraction_of_full_batch": answered / seconds / full,
            "late_first_token_seconds": statistics.median(late),
            "late_first_token_seconds_at_most": max(late),
        }

    def _prompt(self, seed: int, count: int) -> list[int]:
        generator = random.Random(seed)
        size = self.bench.limits.config.vocab_size
        return [generator.randrange(size) for _ in range(count)]

    @contextmanager
    def _manager(self, rows: int) -> Iterator[Any]:
        """A manager that answers to the last token."""
        model: Any = self.bench.model
        with model.continuous_batching_context_manager(
            GenerationConfig(do_sample=False, eos_token_id=None),
            continuous_batching_config=ContinuousBatchingConfig(max_requests_per_batch=rows),
        ) as manager:
            yield manager

    def _answers(self, manager: Any, asked: list[tuple[list[int], int]]) -> None:
        """Ask, and wait for all answers.

        Raises:
            RuntimeError: If one is an error, or has another number of tokens.
        """
        counts = {manager.add_request(text, max_new_tokens=n): n for text, n in asked}
        while counts:
            out = self._result(manager)
            if out.error is not None or len(out.generated_tokens) != counts.pop(out.request_id):
                raise RuntimeError(f"request {out.request_id}: {out.error or 'a wrong length'}")

    def _result(self, manager: Any) -> Any:
        while True:
            self.bench.effort.check_time()
            out = manager.get_result(timeout=1)
            if out is not None:
                return out
            if not manager.is_running():
                raise RuntimeError("the manager's thread has ended")

    def _warm_up(self, manager: Any, rows: int) -> None:
        """Steps of all numbers of rows, and readings of texts of the same length and of others."""
        shortest, longest = self.workload.prompts
        lengths = [(shortest, 4 + i) for i in range(2 * rows)] + [(longest, 2)] * 2
        lengths += [(max(shortest, longest - 3 * i), 2) for i in range(12)]
        self._answers(
            manager, [(self._prompt(i, n), count) for i, (n, count) in enumerate(lengths)]
        )

    def _late(self, manager: Any, rows: int) -> list[float]:
        """Seconds to the first token of requests that arrive while all rows but one decode."""
        first, last = self.workload.prompts
        active = manager.batch_processor.active
        names = [
            manager.add_request(self._prompt(i, first), max_new_tokens=1 << 20)
            for i in range(rows - 1)
        ]
        found = []
        for i in range(LATE_REQUESTS):
            while len(active) != rows - 1:
                self.bench.effort.check_time()
                time.sleep(POLL_SECONDS)
            start = time.perf_counter()
            manager.add_request(self._prompt(i, (first + last) // 2), max_new_tokens=1)
            self._result(manager)
            found.append(time.perf_counter() - start)
        for name in names:
            manager.cancel_request(name)
        return found
