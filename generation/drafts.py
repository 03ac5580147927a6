"""Drafts for many texts that decode together (`prompt_lookup_num_tokens` of requests).

A step reads the same number of tokens of each text. What a longer one costs depends on all tokens
together, and what it gives on every text's own chances.
"""

import time
from collections.abc import Callable, Sequence

from kimi_linear.generation.lookup import DOUBT, Chances, Expectation, expected_tokens
from kimi_linear.ops.runtime import power_of_two

# What a step takes is remembered by how many tokens it reads; a new one counts so much.
NEW_SHARE = 0.2
# Besides none and the most that are allowed, so many tokens are drafted: steps of each number are
# recorded for each number of texts.
SHORT_DRAFT = 3


class GroupDrafts:
    """What is drafted for the texts of a step.

    Args:
        most: Tokens of a text, at most.
        match_size: See `MatchFinder`.
        most_tokens: Of a step, those of all texts.
        clock: Seconds that go by.
    """

    def __init__(
        self,
        most: int,
        match_size: int,
        most_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.lengths, self.match_size = sorted({0, min(most, SHORT_DRAFT), most}), match_size
        self.most_tokens, self.clock = most_tokens, clock
        self.chances = Chances()
        self.texts: dict[int, Expectation] = {}
        self._seconds: dict[int, float] = {}  # of a step, by tokens
        self._ready: set[tuple[int, int]] = set()  # texts and tokens of each that have been made
        self._started: tuple[int, int, float] | None = None

    def begin(self, row: int, tokens: Sequence[int], ends: set[int]) -> None:
        """A text, by its row."""
        self.texts[row] = Expectation(self.match_size, self.lengths[-1], ends, self.chances)
        self.texts[row].extend(tokens)

    def choose(self, rows: list[int]) -> list[list[int]]:
        """A draft for each text, all equally long, so that most tokens a second are expected. What
        is missing of one is filled with the text's last token."""
        size = power_of_two(len(rows))
        allowed = [
            each for each in self.lengths if not each or size * (1 + each) <= self.most_tokens
        ]
        length = max(allowed, key=lambda each: self._value(rows, size, each))
        return [self._draft(row, length) for row in rows]

    def _value(self, rows: list[int], size: int, length: int) -> float:
        """Tokens a second."""
        total = 0.0
        for row in rows:
            match, tokens = self.texts[row].found or (1, [])
            total += expected_tokens(self.chances.chance(match), min(length, len(tokens)))
        return total / self._cost(size * (1 + length))

    def _cost(self, num_tokens: int) -> float:
        """Seconds of a step; without a measurement, experts that several tokens share make it grow
        as the square root of their number."""
        known = self._seconds
        if not known:
            return float(num_tokens**0.5)
        near = min(known, key=lambda each: abs(each - num_tokens))
        return float(known[near] * (num_tokens / near) ** 0.5)

    def _draft(self, row: int, length: int) -> list[int]:
        text = self.texts[row]
        _, tokens = text.found or (1, [])
        return [*tokens, *length * text.finder.tokens[-1:]][:length]

    def start(self, num_texts: int, num_tokens: int) -> None:
        """A step of so many tokens of each text begins, with nothing else before it."""
        self._started = power_of_two(num_texts), num_tokens, self.clock()

    def end(self) -> None:
        """The step has ended. The first of its kind is recorded, and says nothing of others."""
        if self._started is None:
            return
        (size, num_tokens, start), self._started = self._started, None
        kind, tokens, taken = (size, num_tokens), size * num_tokens, self.clock() - start
        if kind in self._ready:
            before = self._seconds.get(tokens, taken)
            self._seconds[tokens] = before + NEW_SHARE * (taken - before)
            self._doubt_others(tokens)
        self._ready.add(kind)

    def _doubt_others(self, tokens: int) -> None:
        """Steps that were slow for another reason are tried again some day."""
        for each, taken in self._seconds.items():
            expected = self._seconds[tokens] * (each / tokens) ** 0.5
            if expected < taken:
                self._seconds[each] = taken * (expected / taken) ** DOUBT
