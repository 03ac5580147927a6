"""Drafts from the text itself (`generate(prompt_lookup_num_tokens=...)`), as many as pay.

Transformers' own generator drafts a fixed number of tokens wherever the last ones have stood
before. A mixture of experts reads more weights for every drafted token, so a draft that is refused
costs as much as it would have saved. Here the number follows what the same kind of match has been
worth so far and how long calls of each length have taken. What a longer draft would have been worth
is known afterwards also where none was made, so nothing is tried for the sake of knowing.
"""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_linear.upstream.generation import CandidateGenerator

# Numbers of drafted tokens, besides the one that is asked for at most: each makes steps of another
# length, which are recorded one by one.
LENGTHS = (1, 3, 7, 15)
# Matches are told apart by their length up to this.
LONGEST_MATCH = 8
# A longer step is first taken to cost this much more by token.
COST_BY_TOKEN = 0.25
# With every call, what calls of other lengths have taken moves this much towards what is to be
# expected from it: one that was slow for another reason would otherwise be the last of its length.
DOUBT = 0.01
# What was learnt before counts this much less with every new draft.
FORGETTING = 0.9


class MatchFinder:
    """Where the last tokens of a text have stood before.

    Args:
        size: Tokens that have to be the same, at most; fewer are tried after it.

    Attributes:
        tokens: The text so far.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.tokens: list[int] = []
        # by the last tokens of a place, the latest one and what follows it
        self._places: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        start = len(self.tokens)
        self.tokens += tokens
        end = len(self.tokens)
        for size in range(1, self.size + 1):  # without a loop over a prompt's tokens
            first = max(start, size)
            columns = (self.tokens[i : end - size + i] for i in range(first - size, first))
            self._places.update(zip(zip(*columns, strict=False), range(first, end), strict=False))

    def find(self) -> tuple[int, int] | None:
        """The latest place where the text has gone on from tokens like its last ones, and how many
        are the same, up to LONGEST_MATCH; None if there is none."""
        tokens, end = self.tokens, len(self.tokens)
        for size in range(min(self.size, end), 0, -1):
            place = self._places.get(tuple(tokens[end - size :]))
            if place is not None:
                while (
                    size < min(LONGEST_MATCH, place)
                    and tokens[place - size - 1] == (tokens[end - size - 1])
                ):
                    size += 1
                return place, min(size, LONGEST_MATCH)
        return None

    def continuation(self, place: int, count: int) -> list[int]:
        """What followed the place; a text that repeats itself goes on repeating."""
        period = len(self.tokens) - place
        return [self.tokens[place + i % period] for i in range(count)]


class DraftLength:
    """How many tokens to draft.

    Args:
        most: At most.
        clock: Seconds that go by; not looked at where there are several processes, which may share
            the model and have to draft alike.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.lengths = sorted({0, most, *(each for each in LENGTHS if each < most)})
        self._clock, self._is_timed = clock, num_processes() == 1
        self._start: float | None = None
        self._length = 0
        self._seconds: dict[int, float | None] = {}  # of a call, by drafted tokens
        # by a match's length, how many tokens of drafts were right and how many were tried
        self._chances = {size: [1.0, 2.0] for size in range(1, LONGEST_MATCH + 1)}

    def chance(self, match: int) -> float:
        """That a drafted token is right, if those before it were."""
        right, tried = self._chances[match]
        return right / tried

    def learn(self, match: int, draft: Sequence[int], text: Sequence[int]) -> None:
        """Compare what might have been drafted with how the text went on."""
        right = 0
        while right < min(len(draft), len(text)) and draft[right] == text[right]:
            right += 1
        tried = min(right + 1, len(draft), len(text))
        chances = self._chances[match]
        chances[0] = FORGETTING * chances[0] + right
        chances[1] = FORGETTING * chances[1] + tried

    def take_time(self) -> None:
        """Note what the last call has taken; the first of its length also makes it ready, as does
        the first one without a draft that comes behind a draft: its step leaves updates pending."""
        if not self._is_timed:
            return
        now = self._clock()
        if self._start is not None:
            taken, before = now - self._start, self._seconds.get(self._length)
            if self._length not in self._seconds:
                if self._length and not any(self._seconds):  # the first draft
                    self._seconds.pop(0, None)
                self._seconds[self._length] = None
            elif before is None:
                self._seconds[self._length] = taken
            else:
                self._seconds[self._length] = before + 0.2 * (taken - before)
            self._doubt_others()
        self._start = now

    def choose(self, match: int, most: int) -> int:
        """The number that gives most tokens a second, `most` of them at most."""
        chance = self.chance(match)
        allowed = [each for each in self.lengths if each <= most]
        self._length = max(allowed, key=lambda each: _tokens(chance, each) / self._cost(each))
        return self._length

    def choose_none(self) -> None:
        """Nothing is drafted."""
        self._length = 0

    def _doubt_others(self) -> None:
        own = self._seconds[self._length]
        for each, taken in self._seconds.items():
            if own and taken and each != self._length:
                expected = own * _first_cost(each) / _first_cost(self._length)
                self._seconds[each] = taken * (expected / taken) ** DOUBT

    def _cost(self, length: int) -> float:
        """Seconds of a call, or what is to be expected from those that were measured."""
        known = {each: taken for each, taken in self._seconds.items() if taken}
        if not known:
            return _first_cost(length)
        if length in known:
            return known[length]
        near = min(known, key=lambda each: abs(each - length))
        return known[near] * _first_cost(length) / _first_cost(near)


def _first_cost(length: int) -> float:
    """What a call is first taken to cost, in those without a draft."""
    return 1 + COST_BY_TOKEN * length


def num_processes() -> int:
    """Processes that torch.distributed knows of."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _tokens(chance: float, length: int) -> float:
    """Tokens that a call is expected to give: those drafted up to the first wrong one, and one."""
    return sum(chance**i for i in range(length + 1))


class PromptLookup(CandidateGenerator):
    """Drafts for assisted decoding of one text.

    Args:
        num_tokens: Drafted tokens, at most.
        match_size: See `MatchFinder`.
        max_length: Tokens of the whole text, at most.
        end_tokens: Ids that end it: none is drafted.
    """

    def __init__(
        self, num_tokens: int, match_size: int, max_length: int, end_tokens: Tensor | None
    ) -> None:
        self.max_length = max_length
        self.ends = set() if end_tokens is None else set(end_tokens.flatten().tolist())
        self.finder, self.length = MatchFinder(match_size), DraftLength(num_tokens)
        self._last: tuple[int, list[int]] | None = None  # match and draft, made or not

    def get_candidates(self, input_ids: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        """The text [1, S] with a draft behind it, and no logits. Nothing is drafted behind the
        prompt, which is read at once: the step after it is the first that can be taken back for
        nothing."""
        is_first = not self.finder.tokens
        new = input_ids[0, len(self.finder.tokens) :].tolist()  # waits for the last call
        if not is_first:
            self.length.take_time()
        if self._last is not None:
            self.length.learn(*self._last, new)
        self.finder.extend(new)
        draft = [] if is_first else self._draft()
        if not draft:
            return input_ids, None
        return torch.cat([input_ids, input_ids.new_tensor([draft])], dim=1), None

    def update_candidate_strategy(self, *args: object) -> None:
        """Nothing: the next call sees what became of a draft."""

    def _draft(self) -> list[int]:
        found = self.finder.find()
        self._last = None
        self.length.choose_none()
        if found is None:
            return []
        place, match = found
        # one token comes from the call itself
        room = self.max_length - len(self.finder.tokens) - 1
        draft = self.finder.continuation(place, min(self.length.lengths[-1], room))
        end = next((i for i, token in enumerate(draft) if token in self.ends), len(draft))
        self._last = match, draft[:end]
        return draft[: self.length.choose(match, end)]
