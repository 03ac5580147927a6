"""Many requests at once: each answer is the one that it gets alone."""

import random
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from builders import tiny_model, token_ids
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import ContinuousBatchingConfig, GenerationConfig

from kimi_linear.generation import requests
from kimi_linear.generation.requests import RequestProcessor

GREEDY = {"do_sample": False, "eos_token_id": None}


def prompts(*lengths):
    return [token_ids(n, seed=n).tolist() for n in lengths]


def alone(model, prompt, count, **settings):
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=count, **{**GREEDY, **settings})
    return out[0, len(prompt) :].tolist()


def config(**settings):
    return GenerationConfig(**{"max_new_tokens": 5, **GREEDY, **settings})


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.core
def test_generate_batch(model):
    texts = prompts(3, 11, 1, 7)
    found = model.generate_batch(texts, config())
    assert [out.prompt_ids for out in found.values()] == texts
    for out, text in zip(found.values(), texts, strict=True):
        assert out.error is None and out.is_finished()
        assert out.generated_tokens == alone(model, text, 5)


@pytest.mark.core
def test_fewer_rows_than_requests(model):
    settings = ContinuousBatchingConfig(max_requests_per_batch=2)
    texts = prompts(3, 4, 5, 6, 7)
    found = model.generate_batch(texts, config(), continuous_batching_config=settings)
    for out, text in zip(found.values(), texts, strict=True):
        assert out.generated_tokens == alone(model, text, 5)


def test_texts_end_where_they_say(model):
    text = prompts(6)[0]
    end = alone(model, text, 5)[2]
    found = model.generate_batch([text], config(eos_token_id=end))
    expected = alone(model, text, 5, eos_token_id=end, pad_token_id=0)
    assert next(iter(found.values())).generated_tokens == expected


def test_log_probabilities(model):
    settings = ContinuousBatchingConfig(return_logprobs=True)
    (out,) = model.generate_batch(
        prompts(6), config(), continuous_batching_config=settings
    ).values()
    with torch.no_grad():
        ids = torch.tensor([out.prompt_ids + out.generated_tokens])
        found = model(ids).logits.log_softmax(dim=-1)[0, 5:-1]
    expected = found.gather(1, ids[0, 6:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(out.logprobs), expected, atol=1e-4, rtol=0)


def test_several_answers_to_a_prompt(model):
    """By the manager: `generate_batch()` of Transformers 5.17 leaves all but one out."""
    settings = config(do_sample=True, num_return_sequences=3, max_new_tokens=12)
    answers = {}
    with model.continuous_batching_context_manager(settings) as manager:
        manager.add_requests(prompts(4, 5))
        while len(answers) < 6:
            out = manager.get_result(timeout=20)
            answers[out.request_id] = tuple(out.generated_tokens)
    assert set(answers) == {f"req_{i}{c}" for i in (0, 1) for c in ("", "__child#0", "__child#1")}
    assert len(set(answers.values())) > 2


def test_more_answers_than_rows_are_an_error(model):
    settings = config(do_sample=True, num_return_sequences=3)
    rows = ContinuousBatchingConfig(max_requests_per_batch=2)
    with model.continuous_batching_context_manager(
        settings, continuous_batching_config=rows
    ) as manager:
        manager.add_request(prompts(4)[0])
        out = manager.get_result(timeout=20)
    assert out.error.startswith("num_return_sequences=3 is not allowed: 2 texts go on at a time")


def test_a_seed_repeats_what_was_drawn(model):
    settings = ContinuousBatchingConfig(seed=7)
    both = [
        model.generate_batch(
            prompts(4, 9), config(do_sample=True), continuous_batching_config=settings
        )
        for _ in range(2)
    ]
    tokens = [[out.generated_tokens for out in found.values()] for found in both]
    assert tokens[0] == tokens[1]


def test_ids_that_the_model_has_not(model):
    bad, good = model.generate_batch([[3, 97], prompts(3)[0]], config()).values()
    assert bad.error == (
        "input_ids has 3 to 97, which is not allowed: they must be from 0 to 96 (vocab_size=97)"
    )
    assert good.error is None


def test_what_cannot_be_answered_is_an_error_of_its_own(model, monkeypatch):
    monkeypatch.setattr(model.config, "max_prompt_tokens", 8)
    first, second, third = model.generate_batch([*prompts(3, 9), []], config()).values()
    assert first.error is None and len(first.generated_tokens) == 5
    assert second.error == (
        "input_ids has 9 tokens, which is not allowed: it must have at most max_prompt_tokens=8, "
        "a field of config.json"
    )
    assert third.error == "input_ids has no token, which is not allowed: it must have one"


def test_long_prompts_are_read_in_pieces(model, monkeypatch):
    widths = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    settings = ContinuousBatchingConfig(max_batch_tokens=8)
    (text,) = prompts(30)
    (out,) = model.generate_batch([text], config(), continuous_batching_config=settings).values()
    handle.remove()
    assert widths == [8, 8, 8, 6, 1, 1, 1, 1]
    assert out.generated_tokens == alone(model, text, 5)


def read_tokens(monkeypatch):
    """How many tokens of prompts each call reads from now on."""
    counts, read = [], requests.Reading.read

    def counted(self):
        before = self._done
        read(self)
        counts.append(self._done - before)

    monkeypatch.setattr(requests.Reading, "read", counted)
    return counts


@pytest.mark.parametrize(("most_tokens", "read"), [(100, [22, 2]), (9, [3, 6, 5, 8, 2])])
def test_prompts_that_are_read_in_one_call(model, monkeypatch, most_tokens, read):
    """End to end, without padding; where they are too long for that, cut anywhere."""
    monkeypatch.setattr(requests, "READ_TEXTS", 4)
    counts = read_tokens(monkeypatch)
    settings = ContinuousBatchingConfig(max_batch_tokens=most_tokens, max_requests_per_batch=8)
    manager = model.init_continuous_batching(config(), settings)
    lengths = (3, 11, 1, 7, 2)
    for n in lengths:
        manager.add_request(prompts(n)[0], request_id=str(n))
    manager.start()
    found = [manager.get_result(timeout=20) for _ in lengths]
    manager.stop(block=True)
    assert counts == read
    for out in found:
        assert out.generated_tokens == alone(model, out.prompt_ids, 5)


def test_texts_go_on_in_one_call(model):
    calls = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(kwargs["cache"])), with_kwargs=True
    )
    manager = model.init_continuous_batching(config())
    for text in prompts(3, 11, 7):
        manager.add_request(text)
    manager.start()
    found = [manager.get_result(timeout=20) for _ in range(3)]
    manager.stop(block=True)
    handle.remove()
    assert calls == [3] * 5  # of five tokens, reading gives the first
    for out in found:
        assert out.generated_tokens == alone(model, out.prompt_ids, 5)


def test_turns():
    """Long answers begin earlier than their time, by so much at most."""
    came = {"a": (0.0, 10), "b": (0.1, 500), "c": (1.9, 10**9), "d": (2.5, None), "e": (0.0, 11)}
    states = [SimpleNamespace(created_time=t, max_new_tokens=n) for t, n in came.values()]
    order = [states.index(state) for state in sorted(states, key=requests._turn)]
    assert "".join("abcde"[i] for i in order) == "bcead"


def test_what_two_prompts_have_in_common():
    size = requests.PREFIX_TOKENS
    text = list(range(3 * size + 5))
    for count in (0, 1, size - 1, size, size + 1, 2 * size, len(text)):
        whole = count - count % size
        assert requests._common(text, text[:count]) == whole
        assert requests._common(text, [*text[:count], -1, *text]) == whole


def beginnings(*lengths):
    """Prompts that begin alike."""
    start = token_ids(20).tolist()
    return [start + token_ids(n, seed=n).tolist() for n in lengths]


@pytest.mark.parametrize("num_rows", [3, 4])
@pytest.mark.parametrize("is_shared", [True, False])
def test_what_prompts_begin_with_is_read_once(model, monkeypatch, is_shared, num_rows):
    """It takes no text's row away, and does not make room for those that are next."""
    monkeypatch.setattr(requests, "PREFIX_TOKENS", 8)
    counts = read_tokens(monkeypatch)
    texts = [*beginnings(3, 5, 9), *prompts(7)]
    settings = ContinuousBatchingConfig(
        allow_block_sharing=is_shared, max_requests_per_batch=num_rows
    )
    manager = model.init_continuous_batching(config(max_new_tokens=1), settings)
    for text in texts:
        manager.add_request(text)
    manager.start()
    found = [manager.get_result(timeout=20) for _ in texts]
    manager.stop(block=True)
    assert sum(counts) == sum(map(len, texts)) - 2 * 16 * is_shared
    for out in found:
        assert out.generated_tokens == alone(model, out.prompt_ids, 1)


def test_an_error_while_reading_ends_that_request_alone(model, monkeypatch):
    """Others of the same call are read again, each by itself."""
    read, (unlucky, *others) = model.model.forward, prompts(3, 4, 5)

    def breaking(*args, input_ids, **kwargs):
        if unlucky[1] in input_ids:
            raise RuntimeError("out of luck")
        return read(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", breaking)
    manager = model.init_continuous_batching(config(max_new_tokens=1))
    names = [manager.add_request(text) for text in (others[0], unlucky, others[1])]
    manager.start()
    found = {out.request_id: out for out in (manager.get_result(timeout=20) for _ in names)}
    manager.stop(block=True)
    monkeypatch.undo()
    assert [found[name].error for name in names] == [None, "out of luck", None]
    for out in found.values():
        if out.error is None:
            assert out.generated_tokens == alone(model, out.prompt_ids, 1)


@pytest.mark.parametrize("room", [8, 1])
def test_prompts_that_memory_is_short_for(model, monkeypatch, room):
    """Fewer are read at once, then in smaller pieces, and what cannot be read is an error."""
    read = model.model.forward

    def in_little_memory(*args, input_ids, **kwargs):
        if input_ids.shape[1] > room:
            raise torch.OutOfMemoryError("no memory for that")
        return read(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.model, "forward", in_little_memory)
    monkeypatch.setattr(requests, "LEAST_READ_TOKENS", 4)
    counts = read_tokens(monkeypatch)
    manager = model.init_continuous_batching(config(max_new_tokens=1))
    for text in prompts(30, 1):
        manager.add_request(text)
    manager.start()
    found = [manager.get_result(timeout=20) for _ in range(2)]
    manager.stop(block=True)
    monkeypatch.undo()
    long, short = sorted(found, key=lambda out: -len(out.prompt_ids))
    assert short.generated_tokens == alone(model, prompts(1)[0], 1)
    if room == 1:
        assert long.error == "no memory for that"
    else:
        assert long.generated_tokens == alone(model, prompts(30)[0], 1)
        assert counts == [6] * 5 + [1]


def test_streams_cancellations_and_late_requests(model):
    texts = prompts(3, 8, 5)
    with model.continuous_batching_context_manager(config(max_new_tokens=6)) as manager:
        manager.add_request(texts[0], request_id="a", streaming=True)
        manager.add_request(texts[1], request_id="b", max_new_tokens=10**6)
        seen = [manager.get_result(timeout=20) for _ in range(3)]
        manager.add_request(texts[2], request_id="c")
        manager.cancel_request("b")
        found = {out.request_id: out for out in seen}
        while not ("c" in found and found["a"].is_finished()):
            out = manager.get_result(timeout=20)
            assert out is not None
            found[out.request_id] = out
    assert [len(out.generated_tokens) for out in seen] == [1, 2, 3]
    assert set(found) == {"a", "c"}
    for name, text in (("a", texts[0]), ("c", texts[2])):
        assert found[name].generated_tokens == alone(model, text, 6)


def test_a_manager_serves_again(model):
    for _ in range(2):
        found = model.generate_batch(prompts(3), config(), persistent_manager=True)
        assert next(iter(found.values())).generated_tokens == alone(model, prompts(3)[0], 5)
    model.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize("is_paused", [False, True])
def test_weights_that_change_under_a_running_manager(monkeypatch, is_paused):
    """Between its requests, or in a pause beside one that goes on: what prompts begin with is read
    with the weights of now."""
    monkeypatch.setattr(requests, "PREFIX_TOKENS", 8)
    model, texts = tiny_model(), beginnings(3, 5, 9)

    def answers(manager):
        names = manager.add_requests(texts)
        found = {out.request_id: out for out in (manager.get_result(timeout=20) for _ in texts)}
        return [found[name].generated_tokens for name in names]

    before = [alone(model, text, 5) for text in texts]
    with model.continuous_batching_context_manager(config()) as manager:
        if is_paused and not hasattr(manager, "pause"):
            pytest.skip("this release has no pause")
        if is_paused:
            manager.add_request(texts[0], request_id="long", max_new_tokens=10**6)
        first = answers(manager)
        with manager.pause() if is_paused else nullcontext():
            model.model.layers[0].self_attn.o_proj.weight.data.mul_(-3)
        second = answers(manager)
        manager.cancel_request("long")
    assert first == before
    assert second == [alone(model, text, 5) for text in texts] != before


@pytest.mark.slow
def test_a_thousand_requests(model):
    """With random arrivals, cancellations and errors: nothing is lost, nothing stays, and no
    request changes another."""
    generator = random.Random(0)
    settings = ContinuousBatchingConfig(max_requests_per_batch=16)
    expected = {n: alone(model, prompts(n)[0], 8) for n in range(1, 12)}
    cancelled, lengths, found = set(), {}, {}
    manager = model.init_continuous_batching(config(max_new_tokens=8), settings)
    manager.start()

    def ask():
        for i in range(1000):
            n = generator.choice([0, *range(1, 12)])
            lengths[f"r{i}"] = n
            manager.add_request(prompts(n)[0], request_id=f"r{i}")
            if generator.random() < 0.1:
                name = f"r{generator.randrange(i + 1)}"
                manager.cancel_request(name)
                cancelled.add(name)

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive() or manager.batch_processor.has_pending_requests():
        out = manager.get_result(timeout=0.5)
        if out is not None:
            found[out.request_id] = out
    manager.stop(block=True, keep_for_next_session=True)
    while (out := manager.get_result(timeout=0.1)) is not None:
        found[out.request_id] = out
    assert set(lengths) - set(found) <= cancelled
    for name, out in found.items():
        if lengths[name] == 0:
            assert out.error is not None
        else:
            assert out.generated_tokens == expected[lengths[name]], name
    processor = manager.batch_processor
    assert isinstance(processor, RequestProcessor)
    assert not processor.active and not processor.texts.caches
    model.destroy_cached_continuous_batching_manager()


def test_models_of_several_processes_are_refused(model, monkeypatch):
    monkeypatch.setattr(model, "_device_mesh", object(), raising=False)
    with pytest.raises(ValueError, match="not supported for a model that several processes share"):
        RequestProcessor(model, None)


def test_models_that_fsdp_divides_are_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(tiny_model(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"several processes share \(tp_size, ep_size, FSDP\)"):
            model.generate_batch(prompts(3), config())
    finally:
        dist.destroy_process_group()
