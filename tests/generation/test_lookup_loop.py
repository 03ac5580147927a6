"""The loop of prompt lookup beside plain `generate()`: texts, streams, caches, draws."""

import pytest
import torch
from builders import tiny_model, token_ids
from late_devices import Stream, look_late
from one_thread import one_thread  # noqa: F401
from tolerance import assert_close
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from kimi_linear import KimiLinearCache
from kimi_linear.generation import lookup_loop
from kimi_linear.generation.lookup import DraftLength, PromptLookup
from kimi_linear.generation.lookup_loop import LookupLoop
from kimi_linear.upstream.lookup_call import LookupCall

pytestmark = pytest.mark.core

GREEDY = dict(do_sample=False, pad_token_id=96, eos_token_id=None)
IDS = token_ids(1, 7).repeat(1, 2)


@pytest.fixture(params=["on time", "late"], autouse=True)
def is_late(request, monkeypatch):
    """Whether the host looks at tokens one step late."""
    if request.param == "late":
        look_late(monkeypatch, lookup_loop)
    return request.param == "late"


@pytest.fixture
def drafts_of(monkeypatch):
    """Drafts are three tokens of this text at most, one of which may be changed."""

    def draft_from(text):
        def draft(self, unknown=0):
            place = len(self.finder.tokens) + unknown
            tokens = text[place : place + min(3, self.max_length - place - 1)]
            return [token + (i == place % 5) for i, token in enumerate(tokens) if place % 7]

        monkeypatch.setattr(PromptLookup, "draft", draft)

    return draft_from


@pytest.fixture(scope="module")
def model():
    return tiny_model(initializer_range=0.3)


@pytest.fixture(scope="module")
def text(model):
    return model.generate(IDS, max_new_tokens=40, **GREEDY)[0].tolist()


@pytest.fixture
def takes(monkeypatch):
    """Of each step that is taken, how many tokens it drafted and how many it added."""
    seen, take = [], LookupLoop._take

    def watched(self, step):
        before = self.num_known
        take(self, step)
        seen.append((len(step.draft), self.num_known - before))

    monkeypatch.setattr(LookupLoop, "_take", watched)
    return seen


class EndsAt(StoppingCriteria):
    """As one of a user, which looks at tensors."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full(input_ids.shape[:1], input_ids.shape[1] - IDS.shape[1] >= self.length)


def test_right_and_wrong_drafts_give_the_greedy_text(model, text, takes, drafts_of):
    drafts_of(text)
    out = model.generate(IDS, max_new_tokens=40, prompt_lookup_num_tokens=3, **GREEDY)
    assert out[0].tolist() == text
    assert set(takes) >= {(0, 1), (3, 1), (3, 2), (3, 3), (3, 4)}
    assert sum(added for _, added in takes) == 40


@pytest.mark.parametrize("how", ["max_length", "end token", "criterion"])
def test_texts_end_anywhere_as_plain_ones(model, text, how, drafts_of):
    """Also within drafts: the text, the stream of tokens, and the cache that is left."""
    drafts_of(text)
    for length in range(1, 10):
        options = {"max_new_tokens": 20, **GREEDY}
        if how == "max_length":
            options["max_new_tokens"] = length
        elif how == "end token":
            options["eos_token_id"] = text[IDS.shape[1] + length - 1]
        else:
            options["stopping_criteria"] = StoppingCriteriaList([EndsAt(length)])
        outs, streams, caches = [], [], []
        for more in ({}, {"prompt_lookup_num_tokens": 3}):
            streams.append(Stream())
            caches.append(KimiLinearCache(model.config, rollback_tokens=length % 3))
            outs.append(
                model.generate(IDS, cache=caches[-1], streamer=streams[-1], **options, **more)
            )
        assert torch.equal(*outs)
        assert streams[0] == streams[1]
        assert len({cache.get_seq_length() for cache in caches}) == 1
        with torch.no_grad():
            own, plain = (model(outs[0][:, -1:], cache=cache).logits for cache in reversed(caches))
        assert_close(own, plain, torch.float32)


class Successors(LogitsProcessor):
    """The next token depends on the last one and on how many there are."""

    def __call__(self, input_ids, scores):
        scores[0, (7 * input_ids[0, -1] + input_ids.shape[1]) % 90] += 100
        return scores


def test_processors_see_the_text_before_each_token(model, takes, drafts_of):
    """Refused tokens are not in it, and drafted ones are."""
    options = {
        "max_new_tokens": 30,
        "min_new_tokens": 12,
        **GREEDY,
        "eos_token_id": list(range(60)),
    }
    options["logits_processor"] = LogitsProcessorList([Successors()])
    expected = model.generate(IDS, **options)
    assert expected.shape[1] > IDS.shape[1] + 12
    drafts_of(expected[0].tolist())
    assert torch.equal(model.generate(IDS, prompt_lookup_num_tokens=3, **options), expected)
    assert (3, 4) in takes and (3, 1) in takes


def test_a_returned_cache_goes_on(model, text, drafts_of):
    drafts_of(text)
    options = dict(max_new_tokens=9, return_dict_in_generate=True, **GREEDY)
    expected = model.generate(IDS, **options)
    out = model.generate(IDS, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(out.sequences, expected.sequences)
    turn = torch.cat([out.sequences, token_ids(1, 3, seed=5)], dim=1)
    # new tokens alone, as its `attention_mask` says
    new, mask = turn[:, out.cache.get_seq_length() :], torch.ones_like(turn)
    more = dict(attention_mask=mask, max_new_tokens=9, **GREEDY)
    found = [
        model.generate(new, cache=each.cache, **more, **how)
        for each, how in ((expected, {}), (out, {"prompt_lookup_num_tokens": 3}))
    ]
    assert torch.equal(*found)


def test_without_drafts_it_draws_what_plain_sampling_draws(model, monkeypatch):
    monkeypatch.setattr(DraftLength, "choose", lambda self, match, most, unknown: 0)
    texts = []
    for more in ({}, {"prompt_lookup_num_tokens": 3}):
        torch.manual_seed(1)
        options = {**GREEDY, "do_sample": True, "top_k": 5, "max_new_tokens": 12}
        texts.append(model.generate(IDS, **options, **more))
    assert torch.equal(*texts)


class Chain:
    """A model of five tokens, each of which depends on the one before alone; its own cache."""

    is_croppable = True

    def __init__(self):
        self.table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
        self.num_tokens = 0

    def __call__(self, input_ids, cache):
        self.num_tokens += input_ids.shape[1]
        return GenerationConfig(logits=self.table[input_ids])

    def _prefill(self, input_ids, config, given):
        return self(input_ids, self)

    def get_seq_length(self):
        return self.num_tokens

    def activate_past_recording(self):
        pass

    def crop(self, count):
        assert -16 <= count <= 0
        self.num_tokens += count


def test_drafts_do_not_change_what_is_drawn(monkeypatch, takes):
    """By counting which token follows which in a long text, a third of it drafted."""
    torch.manual_seed(0)
    monkeypatch.setattr(DraftLength, "choose", lambda self, match, most, unknown: min(3, most))
    length, chain = 4000, Chain()
    monkeypatch.setattr(LookupCall, "decoding", lambda self, model: torch.no_grad())
    call = LookupCall(
        ids=torch.tensor([[0, 1]]),
        cache=chain,
        processors=LogitsProcessorList(),
        criteria=StoppingCriteriaList(),
        max_length=length,
        ends=set(),
        config=GenerationConfig(do_sample=True),
        streamer=None,
        of_forwards={},
    )
    tokens = LookupLoop(chain, call, PromptLookup(3, 2, length, None)).run()[0]
    assert sum(added - 1 for _, added in takes) > length / 6
    assert len(tokens) == length and chain.num_tokens == length - 1
    counts = torch.bincount(tokens[:-1] * 5 + tokens[1:], minlength=25).view(5, 5).double()
    total = counts.sum(1, keepdim=True)
    wanted = chain.table.softmax(-1).double()
    errors = (counts / total - wanted) / (wanted * (1 - wanted) / total).sqrt()
    assert errors.abs().max() < 4  # standard deviations, of 25


def test_the_host_is_one_step_behind(model, is_late, monkeypatch):
    """It sees a token when the next step has been launched, if nothing is drafted."""
    monkeypatch.setattr(DraftLength, "choose", lambda self, match, most, unknown: 0)
    order, launch, take = [], LookupLoop._launch, LookupLoop._take
    monkeypatch.setattr(
        LookupLoop, "_launch", lambda *args: order.append("launch") or launch(*args)
    )
    monkeypatch.setattr(LookupLoop, "_take", lambda *args: order.append("take") or take(*args))
    model.generate(IDS, max_new_tokens=4, prompt_lookup_num_tokens=3, **GREEDY)
    pairs = ["launch", "take"] if is_late else ["take", "launch"]
    assert order == [*pairs * 3, "take"]


@pytest.mark.parametrize(
    "unusual",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"attention_mask": torch.tensor([[0] * 3 + [1] * 11])},
        {"synced_gpus": True},
    ],
    ids=lambda unusual: next(reversed(unusual)),
)
def test_what_it_does_not_know_goes_to_transformers(model, unusual, monkeypatch):
    monkeypatch.setattr(LookupLoop, "run", None)
    options = dict(max_new_tokens=6, **GREEDY)
    if "synced_gpus" in unusual:
        monkeypatch.setattr(
            type(model), "_has_unfinished_sequences", lambda _, over, *a, **k: not over
        )
    outs = [
        model.generate(IDS, **options, **unusual, **more)
        for more in ({}, {"prompt_lookup_num_tokens": 3})
    ]
    outs = [getattr(out, "sequences", out) for out in outs]
    assert torch.equal(*outs)
