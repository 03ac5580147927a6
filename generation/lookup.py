"""Drafts from the text itself (`generate(prompt_lookup_num_tokens=...)`), as many as pay.

Transformers' own generator drafts a fixed number of tokens wherever the last ones have stood
before. A mixture of experts reads more weights for every drafted token, so a draft that is refused
costs as much as it would have saved. Here the number follows what the same kind of match has been
worth so far and how long calls of each length have taken. What a longer draft would have been worth
is known afterwards also where none was made, so nothing is tried for the sake of knowing.

`lookup_loop.py` decodes with these drafts; Transformers' own loop does where that one cannot.
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
# With every call, what calls of other lengths have taken moves this much down to what is to be
# expected from it: one that was slow for another reason would otherwise be the last of its length.
DOUBT = 0.005
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


class Chances:
    """How often tokens that were expected have come, by the length of the match that said so."""

    def __init__(self) -> None:
        # how many tokens were right and how many were tried
        self._chances = {size: [1.0, 2.0] for size in range(1, LONGEST_MATCH + 1)}

    def chance(self, match: int) -> float:
        """That a drafted token is right, if those before it were."""
        right, tried = self._chances[match]
        return right / tried

    def learn(self, match: int, draft: Sequence[int], text: Sequence[int]) -> None:
        """Compare what might have been drafted with how the text went on."""
        right = num_right(draft, text)
        tried = min(right + 1, len(draft), len(text))
        chances = self._chances[match]
        chances[0] = FORGETTING * chances[0] + right
        chances[1] = FORGETTING * chances[1] + tried


class DraftLength(Chances):
    """How many tokens to draft.

    Args:
        most: At most.
        clock: Seconds that go by; not looked at where there are several processes, which may share
            the model and have to draft alike.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self.lengths = sorted({0, most, *(each for each in LENGTHS if each < most)})
        self._clock, self._is_timed = clock, num_processes() == 1
        self._start: float | None = None
        self._seconds: dict[int, float] = {}  # of a call, by drafted tokens
        self._ready: set[int] = set()  # numbers of drafted tokens whose steps have been made ready

    def take_time(self, drafted: int, behind: int = 0) -> None:
        """Note what the call that has just ended took since the one before it.

        The first of its length also makes it ready, as does the first one without a draft that
        comes behind a draft: its step leaves updates pending.

        Args:
            drafted: Tokens that it drafted.
            behind: Those of the call before. What a call without a draft takes more behind one,
                which leaves the device waiting or refused tokens to take back, is the draft's.
        """
        if not self._is_timed:
            return
        now, seconds = self._clock(), self._seconds
        if self._start is not None:
            taken, before = now - self._start, seconds.get(drafted)
            cost = seconds.get(behind) if behind and not drafted else None
            if drafted not in self._ready:
                if not any(self._ready):  # the first draft
                    self._ready.discard(0)
                self._ready.add(drafted)
            elif cost and before:
                seconds[behind] = cost + 0.2 * max(taken - before, 0.0)
            else:
                seconds[drafted] = taken if before is None else before + 0.2 * (taken - before)
                self._doubt_others(drafted)
        self._start = now

    def choose(self, match: int, most: int, unknown: int = 0) -> int:
        """The number that gives most tokens a second; 0 until it is known what that takes.

        Args:
            match: Length of the match.
            most: At most.
            unknown: Tokens that were not known when the match was found: a draft behind them is
                right only if they are what it goes on from.
        """
        if self._is_timed and 0 not in self._seconds:
            return 0
        chance = self.chance(match)
        allowed = [each for each in self.lengths if each <= most]
        return max(
            allowed, key=lambda each: expected_tokens(chance, each, unknown) / self._cost(each)
        )

    def _doubt_others(self, drafted: int) -> None:
        own = self._seconds[drafted]
        for each, taken in self._seconds.items():
            expected = own * _first_cost(each) / _first_cost(drafted)
            if each != drafted and expected < taken:
                self._seconds[each] = taken * (expected / taken) ** DOUBT

    def _cost(self, length: int) -> float:
        """Seconds of a call, or what is to be expected from those that were measured."""
        known = self._seconds
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


def expected_tokens(chance: float, length: int, unknown: int = 0) -> float:
    """Tokens that a call is expected to give: those drafted up to the first wrong one, and one."""
    return 1 + sum(chance ** (unknown + i) for i in range(1, length + 1))


def num_right(draft: Sequence[int], text: Sequence[int]) -> int:
    """How many of a draft's tokens are the text's, up to the first that is not."""
    pairs = zip(draft, text, strict=False)
    least = min(len(draft), len(text))
    return next((i for i, (one, other) in enumerate(pairs) if one != other), least)


class Expectation:
    """What a text is expected to go on with: what followed where its last tokens stood before.

    Args:
        match_size: See `MatchFinder`.
        most: Tokens, at most.
        ends: Ids that end the text: none is expected.
        chances: Learn from what came.

    Attributes:
        found: Length of the match, and the tokens; None if there is no match.
    """

    def __init__(self, match_size: int, most: int, ends: set[int], chances: Chances) -> None:
        self.finder, self.most, self.ends = MatchFinder(match_size), most, ends
        self.chances = chances
        self.found: tuple[int, list[int]] | None = None

    def extend(self, new: Sequence[int]) -> None:
        """Append to the text, and compare it with what was to be expected."""
        if self.found is not None:
            self.chances.learn(*self.found, new)
        self.finder.extend(new)
        found, self.found = self.finder.find(), None
        if found is not None:
            place, match = found
            tokens = self.finder.continuation(place, self.most)
            end = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
            self.found = match, tokens[:end]


class PromptLookup(Expectation, CandidateGenerator):
    """Drafts for one text.

    Args:
        num_tokens: Drafted tokens, at most.
        match_size: See `MatchFinder`.
        max_length: Tokens of the whole text, at most.
        end_tokens: Ids that end it: none is drafted.
    """

    def __init__(
        self, num_tokens: int, match_size: int, max_length: int, end_tokens: Tensor | None
    ) -> None:
        self.max_length, self.length = max_length, DraftLength(num_tokens)
        ends = set() if end_tokens is None else set(end_tokens.flatten().tolist())
        # one more than is drafted: the first may be on its way
        super().__init__(match_size, num_tokens + 1, ends, self.length)
        self._drafted = 0

    def draft(self, unknown: int = 0) -> list[int]:
        """What to draft behind the text and `unknown` tokens more, which are being chosen."""
        if self.found is None:
            return []
        match, tokens = self.found
        # one token comes from the call itself
        room = self.max_length - len(self.finder.tokens) - unknown - 1
        most = max(min(len(tokens) - unknown, room), 0)
        return tokens[unknown : unknown + self.length.choose(match, most, unknown)]

    def get_candidates(self, input_ids: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        """The text [1, S] with a draft behind it, and no logits, for Transformers' loop. Nothing is
        drafted behind the prompt, which is read at once: the step after it is the first that can be
        taken back for nothing."""
        is_first = not self.finder.tokens
        new = input_ids[0, len(self.finder.tokens) :].tolist()  # waits for the last call
        if not is_first:
            self.length.take_time(self._drafted)
        self.extend(new)
        draft = [] if is_first else self.draft()
        self._drafted = len(draft)
        if not draft:
            return input_ids, None
        return torch.cat([input_ids, input_ids.new_tensor([draft])], dim=1), None

    def update_candidate_strategy(self, *args: object) -> None:
        """Nothing: the next call sees what became of a draft."""
