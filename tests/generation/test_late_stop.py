"""`generate()` that asks one step late whether to stop: the same texts, streams and caches."""

import pytest
import torch
from builders import tiny_model, token_ids
from late_devices import Stream, look_late
from tolerance import assert_close
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMixin

from kimi_linear import KimiLinearCache
from kimi_linear.upstream import late_stop

pytestmark = [pytest.mark.core, pytest.mark.kernels]

END, PAD, PROMPT = 95, 96, 5
# tokens that each row writes before the end of its text
LENGTHS = {"one row": [4], "several": [2, 6, 3], "all at once": [3, 3], "to the limit": [1, 20]}
each_text = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


class EndAfter(LogitsProcessor):
    """Each row's text ends after so many tokens, and not before."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __call__(self, input_ids, scores):
        scores[:, END] = -torch.inf
        for row, length in enumerate(self.lengths):
            if input_ids.shape[1] >= PROMPT + length:
                scores[row] = -torch.inf
                scores[row, END] = 0.0
        return scores


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(request, monkeypatch):
    model = tiny_model()
    if request.param == "cuda":
        return model.to("cuda", torch.bfloat16)
    look_late(monkeypatch, late_stop)
    return model


def generate(model, lengths, **kwargs):
    """The text, and how many forward passes it took."""
    calls, forward = [], model.forward

    def counting(*args, **kwargs):
        calls.append(0)
        return forward(*args, **kwargs)

    model.forward = counting
    try:
        text = model.generate(
            token_ids(len(lengths), PROMPT).to(model.device),
            logits_processor=LogitsProcessorList([EndAfter(lengths)]),
            **{"max_new_tokens": 8, "do_sample": False, **kwargs},
            eos_token_id=END,
            pad_token_id=PAD,
        )
    finally:
        del model.forward
    return text, len(calls)


def on_time(monkeypatch, model, lengths, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(late_stop, "LATE_DEVICE_TYPES", ())
        return generate(model, lengths, **kwargs)


@each_text
@pytest.mark.parametrize("do_sample", [False, True])
def test_same_text_one_pass_more(model, monkeypatch, lengths, do_sample):
    torch.manual_seed(1)
    expected, passes = on_time(monkeypatch, model, lengths, do_sample=do_sample)
    torch.manual_seed(1)
    text, late_passes = generate(model, lengths, do_sample=do_sample)
    assert text.tolist() == expected.tolist()
    assert late_passes == passes + (max(lengths) < 8)


@pytest.mark.parametrize("lengths", [[4], [20]])
def test_same_stream(model, monkeypatch, lengths):
    expected, stream = Stream(), Stream()
    on_time(monkeypatch, model, lengths, streamer=expected)
    generate(model, lengths, streamer=stream)
    assert stream == expected


@each_text
def test_returned_cache_has_the_same_tokens(model, monkeypatch, lengths):
    options = dict(return_dict_in_generate=True, output_logits=True)
    expected, _ = on_time(monkeypatch, model, lengths, **options)
    out, _ = generate(model, lengths, **options)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert len(out.logits) == len(expected.logits)
    cache, old = out.cache, expected.cache
    assert cache.get_seq_length() == old.get_seq_length() == out.sequences.shape[1] - 1
    assert cache.layers[0].rollback.tokens == old.layers[0].rollback.tokens
    with torch.no_grad():
        last = out.sequences[:, -1:]
        logits, wanted = (model(last, cache=each).logits for each in (cache, old))
    dtype = torch.bfloat16 if model.device.type == "cuda" else torch.float32
    assert_close(logits, wanted, dtype, "logits")


def test_cache_that_cannot_go_back_is_asked_on_time(model):
    lengths, cache = [3], KimiLinearCache(model.config, rollback_tokens=0)
    text, passes = generate(model, lengths, cache=cache)
    assert text.shape[1] == PROMPT + 4 and passes == 4
    assert cache.get_seq_length() == text.shape[1] - 1


def test_several_gpus_are_asked_on_time(model, monkeypatch):
    monkeypatch.setattr(GenerationMixin, "_sample", lambda self, *args, **kwargs: "on time")
    assert model._sample(synced_gpus=True) == "on time"


def test_only_on_devices_that_are_named():
    assert late_stop.LATE_DEVICE_TYPES == ("cuda",)
    check = late_stop.LateStopCheck.is_supported
    cache = KimiLinearCache(tiny_model().config)
    assert check(torch.device("cuda"), cache, True, False)
    assert not check(torch.device("cuda"), cache, True, True)
    assert not check(torch.device("cpu"), cache, True, False)
    assert not check(torch.device("cuda"), None, False, False)


def test_loop_of_another_form_is_left_alone(monkeypatch):
    """As that of a library that has put its own in place of Transformers'."""

    def other(self, *args, **kwargs):
        return "theirs"

    model = tiny_model()
    late_stop.late_sample.cache_clear()
    monkeypatch.setattr(GenerationMixin, "_sample", other)
    try:
        assert late_stop.late_sample() is None and model._sample() == "theirs"
    finally:
        late_stop.late_sample.cache_clear()
    monkeypatch.undo()
    assert late_stop.late_sample() is not None
