"""Drafts from the text itself: where they come from, and how many are made."""

import random

import pytest
import torch
from builders import tiny_model, token_ids
from hypothesis import given
from hypothesis import strategies as st

from kimi_linear.generation import lookup as lookup_module
from kimi_linear.generation.lookup import LONGEST_MATCH, DraftLength, MatchFinder, PromptLookup

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def slow_find(text, size):
    """The latest place behind the longest of the last `size` tokens or fewer, by looking at all."""
    for own in range(min(size, len(text)), 0, -1):
        places = [i for i in range(own, len(text)) if text[i - own : i] == text[-own:]]
        if places:
            place = places[-1]
            while own < min(LONGEST_MATCH, place) and text[place - own - 1] == text[-own - 1]:
                own += 1
            return place, own
    return None


@given(tokens, st.integers(1, 4), st.integers(0, 39))
def test_matches(text, size, cut):
    finder = MatchFinder(size)
    finder.extend(text[:cut])
    finder.extend(text[cut:])
    assert finder.find() == slow_find(text, size)


def test_long_matches_count_as_the_longest():
    """`max_matching_ngram_size` may be above LONGEST_MATCH."""
    text = list(range(12))
    finder = MatchFinder(10)
    finder.extend(text + text)
    assert finder.find() == (12, LONGEST_MATCH)
    found = PromptLookup(3, 10, 100, None)
    for tokens in (text + text, [*text, *text, 0]):
        ids, _ = found.get_candidates(torch.tensor([tokens]))
    found.get_candidates(ids)


def test_a_repeating_text_goes_on_repeating():
    finder = MatchFinder(2)
    finder.extend([7, 1, 2, 3, 1, 2, 3, 1])
    assert finder.find() == (5, 4)
    assert finder.continuation(5, 7) == [2, 3, 1, 2, 3, 1, 2]


class Calls:
    """Calls by a clock of their own: a call of n drafted tokens takes 1 + cost * n seconds."""

    def __init__(self, most, cost):
        self.now, self.cost, self.drafted = 0.0, cost, 0
        self.length = DraftLength(most, lambda: self.now)

    def run(self, count, chance, seed=0):
        """Tokens a second over `count` calls whose drafted tokens are right by chance."""
        generator, start, made = random.Random(seed), self.now, 0
        for _ in range(count):
            self.length.take_time(self.drafted)
            right = 0
            while right < 15 and generator.random() < chance:
                right += 1
            self.drafted = drafted = self.length.choose(4, 15)
            text = [1] * min(right, drafted + 1) + [2] * (right <= drafted)
            self.length.learn(4, [1] * self.length.lengths[-1], text)
            made += len(text)
            self.now += 1 + self.cost * drafted
        return made / (self.now - start)


@pytest.mark.parametrize("cost", [0.1, 0.25, 0.6])
def test_drafts_that_are_wrong_are_left_off(cost):
    calls = Calls(10, cost)
    calls.run(20, 0.02)
    assert calls.run(400, 0.02, seed=1) > 0.97


@pytest.mark.parametrize("cost", [0.1, 0.25])
def test_drafts_that_are_right_become_long(cost):
    calls = Calls(15, cost)
    calls.run(20, 0.95)
    best = max(sum(0.95**i for i in range(n + 1)) / (1 + cost * n) for n in (1, 3, 7, 15))
    assert calls.run(400, 0.95, seed=1) > 0.8 * best
    assert calls.run(20, 0.0, seed=2) < 1  # what has been worth it is not at once given up
    assert calls.run(200, 0.0, seed=3) > 0.95


def test_recording_a_length_does_not_count():
    calls, drafted = Calls(3, 0.1), 0
    for _ in range(12):
        calls.length.take_time(drafted)
        drafted = calls.length.choose(8, 3)
        calls.length.learn(8, [1] * 3, [1] * (drafted + 1))
        calls.now += 100 if drafted == 3 and 3 not in calls.length._ready else 1.0
    assert drafted == 3


def test_recording_a_step_behind_a_draft_does_not_count():
    """One token is another step once there were drafts, as the states have updates pending."""
    calls, drafts = Calls(3, 0.1), [0, 0, 0, 3, 0, 0, 3, 0]
    calls.length.take_time(0)
    for place, drafted in enumerate(drafts):
        calls.now += 100 if place in (0, 3, 4) else 1 + 0.1 * drafted
        calls.length.take_time(drafted)
    assert calls.length._seconds == pytest.approx({0: 1.0, 3: 1.3}, rel=0.01)
    assert calls.run(200, 0.02) > 0.97


@pytest.mark.parametrize("drafted", [1, 3])
def test_a_call_that_took_long_once_is_not_held_against_its_length(drafted):
    calls, counts = Calls(drafted, 0.1), {}
    choose = calls.length.choose
    for _ in range(3):  # nothing was found at first
        calls.now += 1.0
        calls.length.take_time(0)

    def choose_and_wait(match, most):
        length = choose(match, most)
        counts[length] = counts.get(length, 0) + 1
        if length == drafted and counts[length] == 2:  # the first that is noted
            calls.now += 10.0
        return length

    calls.length.choose = choose_and_wait
    calls.run(300, 0.95)
    best = sum(0.95**i for i in range(drafted + 1)) / (1 + 0.1 * drafted)
    assert calls.run(300, 0.95, seed=1) > 0.9 * best


def test_processes_draft_alike(monkeypatch):
    """Those that share a model, as in tensor parallelism, each by a clock of its own."""
    monkeypatch.setattr(lookup_module, "num_processes", lambda: 2)
    drafts = []
    for seconds in (0.01, 100.0):  # of a drafted token, on this process
        found, now, generator = PromptLookup(15, 2, 1000, None), [0.0], random.Random(0)
        found.length._clock = lambda now=now: now[0]
        text, widths = [1, 2, 3] * 2, []
        for _ in range(60):
            ids, _ = found.get_candidates(torch.tensor([text]))
            widths.append(ids.shape[1] - len(text))
            now[0] += 1 + seconds * widths[-1]
            text.append(text[-3] if generator.random() < 0.7 else 0)
        drafts.append(widths)
    assert drafts[0] == drafts[1] and max(drafts[0]) > 0


def lookup(text, most=3, max_length=100, ends=None):
    found = PromptLookup(most, 2, max_length, None if ends is None else torch.tensor(ends))
    found.get_candidates(torch.tensor([text[:-1]]))  # the prompt
    found.length.choose = lambda match, count, unknown: min(most, count)
    ids, logits = found.get_candidates(torch.tensor([text]))
    assert logits is None and ids[0, : len(text)].tolist() == text
    return ids[0, len(text) :].tolist()


def test_drafts_end_with_the_text():
    text = [5, 1, 2, 3, 4, 5, 1]
    assert lookup(text) == [2, 3, 4]
    assert lookup(text, ends=[3]) == [2]
    assert lookup(text, max_length=9) == [2]
    assert lookup(text, max_length=8) == []
    assert lookup([1, 2, 3]) == []


def test_nothing_is_drafted_behind_the_prompt():
    ids = torch.tensor([[1, 2, 1, 2]])
    assert PromptLookup(3, 2, 100, None).get_candidates(ids)[0] is ids


@pytest.mark.core
def test_generate_drafts_from_the_text(monkeypatch):
    """Its ids are the greedy ones, and some of its calls read several tokens."""
    model, ids = tiny_model(), token_ids(1, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.zero_()  # each token has its successor: the text runs into a circle
    settings = {"max_new_tokens": 80, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **settings)
    widths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    monkeypatch.setattr(DraftLength, "choose", lambda self, match, most, unknown=0: min(2, most))
    out = model.generate(ids, prompt_lookup_num_tokens=3, **settings)
    assert torch.equal(out, expected)
    assert widths[0] == ids.shape[1] and 3 in widths and 4 not in widths and len(widths) < 60
