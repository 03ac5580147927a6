"""Random requests that share a pool with little memory: each is answered as if alone, and all
memory comes back. The pool's step runs in torch (`pool_steps.py`)."""

import functools
import random
import time

import pytest
import torch
from builders import tiny_model, token_ids
from late_devices import look_late
from pool_steps import step_in_torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from kimi_linear.cache.pool import TextPool
from kimi_linear.generation import requests, texts
from kimi_linear.generation.drafts import GroupDrafts
from kimi_linear.upstream.requests import PAGE_SIZE

PAGE = 32
BEGINNINGS = (0, 40, 64, 100)
model_of = functools.cache(tiny_model)


@functools.cache
def alone(begins, rest, seed):
    """A prompt, and the 24 tokens that it is answered with."""
    start = token_ids(begins, seed=begins)
    ids = torch.cat([start, token_ids(rest, seed=seed)])[None]
    out = model_of().generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)
    return ids[0].tolist(), out[0, ids.shape[1] :].tolist()


def pooled(monkeypatch, step=step_in_torch):
    """Have requests decode in a pool; the processors that are made from now on."""
    model, processors = model_of(), []
    make = type(model).request_processor
    model.request_processor = lambda manager: (
        processors.append(make(model, manager)) or processors[-1]
    )
    monkeypatch.setattr(requests, "pool_obstacle", lambda *args: "")
    monkeypatch.setattr(texts, "decode_pool", step)
    monkeypatch.setattr(texts, "record_pool", lambda *args: None)
    return processors


def run(seed, monkeypatch, num_drafted=None):
    """A workload, with cancellations, and answers that end early."""
    generator = random.Random(seed)
    model, processors = model_of(), pooled(monkeypatch)
    monkeypatch.setattr(requests, "PREFIX_TOKENS", PAGE)
    if generator.random() < 0.7:
        look_late(monkeypatch, requests)
    settings = ContinuousBatchingConfig(
        **{PAGE_SIZE: PAGE},
        num_blocks=generator.randint(3, 24),
        max_requests_per_batch=generator.randint(1, 6),
        max_batch_tokens=generator.choice([7, 40, 8192]),
    )
    greedy = GenerationConfig(do_sample=False, prompt_lookup_num_tokens=num_drafted)
    count = generator.randint(1, 12)
    expected, found, cancelled = {}, {}, set()
    manager = model.init_continuous_batching(greedy, settings)
    manager.start()
    for i in range(count):
        prompt, answer = alone(generator.choice(BEGINNINGS), generator.randint(1, 40), seed=i)
        count_new, end = generator.randint(1, 24), None
        answer = answer[:count_new]
        if generator.random() < 0.4:
            end = generator.choice(answer)
            answer = answer[: answer.index(end) + 1]
        expected[f"r{i}"] = answer
        name = manager.add_request(
            prompt, request_id=f"r{i}", max_new_tokens=count_new, eos_token_id=end
        )
        assert name == f"r{i}"
        if generator.random() < 0.1:
            cancelled.add(f"r{generator.randint(0, i)}")
            manager.cancel_request(next(iter(cancelled)))
        time.sleep(generator.choice([0, 0, 0.02]))
    deadline = time.monotonic() + 120
    while set(expected) - set(found) - cancelled:
        assert time.monotonic() < deadline, "requests are not answered any more"
        out = manager.get_result(timeout=0.1)
        if out is not None:
            found[out.request_id] = out
    manager.stop(block=True)
    for name, out in found.items():
        if out.error is None:
            assert out.generated_tokens == expected[name]
        else:  # longer than all memory
            assert "memory" in out.error
    (processor,) = processors
    processor.reset()
    pool = processor.texts.pool
    assert (pool.num_free_rows, pool.num_free_pages) == (pool.num_rows, pool.num_pages)
    assert not any(pool.lengths) and not any(pool._uses)


@pytest.mark.parametrize(("free", "num_rows"), [(1 << 20, 4), (1 << 18, 4), (0, 1)])
def test_memory_that_a_pool_takes(free, num_rows, monkeypatch):
    """As much as it may, of all that is not in use."""
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (calls.append("asked"), (free, 0))[1]
    )
    pool = texts.PooledTexts(model_of(), 4, None, PAGE, 0.5).pool
    assert calls == ["emptied", "asked"]
    row, page = TextPool.bytes_of(model_of().config, PAGE, model_of().dtype)
    taken = sum(pool.memory_bytes().values())
    assert taken == (pool.num_rows + 1) * row + (pool.num_pages + 1) * page
    if free:
        assert free / 2 - page < taken <= free / 2
    assert pool.num_rows == num_rows + 1


@pytest.mark.parametrize("has_memory", [True, False])
def test_a_warm_up_records_what_a_pool_replays(has_memory, monkeypatch):
    """Where there is no memory for some of it, requests are answered all the same."""
    recorded, processors = [], pooled(monkeypatch)

    def record(*args):
        recorded.append(args)
        if not has_memory and args[2] > 2:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(texts, "record_pool", record)
    model, greedy = model_of(), GenerationConfig(do_sample=False, eos_token_id=None)
    settings = ContinuousBatchingConfig(max_requests_per_batch=5, num_blocks=9)
    ids, answer = alone(0, 9, seed=0)
    for does_warm_up in (False, True):
        with model.continuous_batching_context_manager(
            greedy, continuous_batching_config=settings, warmup=does_warm_up
        ) as manager:
            manager.add_request(ids, max_new_tokens=24)
            assert manager.get_result(timeout=60).generated_tokens == answer
    pool = processors[1].texts.pool
    assert recorded == [(model, pool, size) for size in (8, 4, 2, 1)]


def test_a_model_reads_once_to_warm_up(monkeypatch):
    """And is left as it was: the next managers find all compiled."""
    model, read, begin = tiny_model(), [], requests.Reading.__init__

    def counted(self, own, texts, *args):
        read.append([len(text) for text in texts])
        begin(self, own, texts, *args)

    monkeypatch.setattr(requests.Reading, "__init__", counted)
    monkeypatch.setattr(requests, "WARM_UP_DEVICES", ("cpu",))
    monkeypatch.setattr(requests, "WARM_UP_TEXTS", ((5,), (9, 3)))
    for _ in range(2):
        with model.continuous_batching_context_manager(GenerationConfig(do_sample=False)):
            pass
    assert read == [[5], [9, 3]]


@pytest.mark.parametrize("is_late", [True, False])
@pytest.mark.parametrize(("end", "num_steps"), [(None, 9), (4, 5)], ids=["full", "early"])
def test_the_host_looks_while_the_next_step_runs(end, num_steps, is_late, monkeypatch):
    """So an end that could not be foreseen costs one step, and one that could be none. On a CPU it
    looks at once."""
    if is_late:
        look_late(monkeypatch, requests)
    steps, seen = [], []
    prompt, answer = alone(0, 9, seed=2)
    assert answer[4] not in answer[:4]

    def step(model, pool, rows, ids):
        steps.append(rows)
        seen.append(len(processors[0].active[rows[0]].generated_tokens))
        return step_in_torch(model, pool, rows, ids)

    processors = pooled(monkeypatch, step)
    (out,) = (
        model_of()
        .generate_batch(
            [prompt],
            GenerationConfig(
                do_sample=False,
                eos_token_id=None if end is None else answer[end],
                max_new_tokens=10,
            ),
            ContinuousBatchingConfig(**{PAGE_SIZE: PAGE}, num_blocks=3),
        )
        .values()
    )
    assert out.generated_tokens == answer[: 10 if end is None else end + 1]
    assert len(steps) == (num_steps if is_late or end is None else num_steps - 1)
    assert seen == list(range(1 - is_late, len(steps) + 1 - is_late))


@pytest.mark.parametrize("is_late", [True, False])
def test_a_reading_is_launched_behind_steps(is_late, monkeypatch):
    """The device has them to do while the host launches it; answers stay the same."""
    if is_late:
        look_late(monkeypatch, requests)
    monkeypatch.setattr(requests, "PATIENCE_SECONDS", 0)
    events = []
    read = requests.Reading.read
    monkeypatch.setattr(
        requests.Reading, "read", lambda self: (events.append("read"), read(self))[1]
    )

    def step(model, pool, rows, ids):
        events.append(len(rows))
        return step_in_torch(model, pool, rows, ids)

    pooled(monkeypatch, step)
    pairs = [alone(0, n, seed=n) for n in (9, 30)]
    outs = model_of().generate_batch(
        [prompt for prompt, _ in pairs],
        GenerationConfig(do_sample=False, eos_token_id=None, max_new_tokens=6),
        ContinuousBatchingConfig(**{PAGE_SIZE: PAGE}, num_blocks=8, max_batch_tokens=9),
    )
    assert [out.generated_tokens for out in outs.values()] == [answer[:6] for _, answer in pairs]
    longer = ["read"] * 4  # in pieces of 9 tokens
    assert events[: 4 + 1 + 2 * is_late + 1] == [*longer, *[1] * (1 + 2 * is_late), "read"]


def test_an_end_behind_a_reading_costs_three_steps(monkeypatch):
    """Two that were queued before it, and the one that the host looks behind."""
    look_late(monkeypatch, requests)
    monkeypatch.setattr(requests, "PATIENCE_SECONDS", 0)
    steps = []

    def step(model, pool, rows, ids):
        steps.append(len(rows))
        return step_in_torch(model, pool, rows, ids)

    pooled(monkeypatch, step)
    (long, first), (short, second) = (alone(0, n, seed=n) for n in (30, 9))
    assert first[1] not in first[:1] + second[:8]
    outs = model_of().generate_batch(
        [long, short],
        GenerationConfig(do_sample=False, eos_token_id=first[1], max_new_tokens=8),
        ContinuousBatchingConfig(**{PAGE_SIZE: PAGE}, num_blocks=8, max_batch_tokens=30),
    )
    assert [out.generated_tokens for out in outs.values()] == [first[:2], second[:8]]
    assert steps == [1, 1, 1, 2, *[1] * 6]  # one that was needed, and three


@pytest.mark.parametrize("is_late", [True, False])
def test_what_was_chosen_before_an_error_is_told(is_late, monkeypatch):
    """A request that the device has answered does not fail, though the host has not looked yet."""
    if is_late:
        look_late(monkeypatch, requests)
    steps = []

    def step(model, pool, rows, ids):
        steps.append(rows)
        if len(steps) == 2:
            raise torch.OutOfMemoryError("no room for a recording")
        return step_in_torch(model, pool, rows, ids)

    pooled(monkeypatch, step)
    pairs = [alone(0, n, seed=n) for n in (9, 30)]
    settings = ContinuousBatchingConfig(**{PAGE_SIZE: PAGE}, num_blocks=8)
    manager = model_of().init_continuous_batching(GenerationConfig(do_sample=False), settings)
    for (prompt, _), count in zip(pairs, (2, 9), strict=True):
        manager.add_request(prompt, request_id=f"{count} tokens", max_new_tokens=count)
    manager.start()
    found = {out.request_id: out for out in (manager.get_result(timeout=20) for _ in pairs)}
    manager.stop(block=True)
    assert found["2 tokens"].error is None
    assert found["2 tokens"].generated_tokens == pairs[0][1][:2]
    assert found["9 tokens"].error == "no room for a recording"
    assert found["9 tokens"].generated_tokens == pairs[1][1][:2]


@pytest.mark.parametrize("seed", range(4))
def test_random_requests(seed, monkeypatch):
    run(seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("num_drafted", [None, 3])
@pytest.mark.parametrize("seed", range(4, 100))
def test_many_random_requests(seed, num_drafted, monkeypatch):
    always_draft(monkeypatch)
    run(seed, monkeypatch, num_drafted)


# ---- drafts -------------------------------------------------------------------------------------


def always_draft(monkeypatch):
    """As many tokens as are allowed, right or wrong."""
    monkeypatch.setattr(GroupDrafts, "_value", lambda self, rows, size, length: length)


@pytest.mark.parametrize("seed", range(4))
def test_random_requests_with_drafts(seed, monkeypatch):
    always_draft(monkeypatch)
    run(seed, monkeypatch, num_drafted=3)


@pytest.mark.parametrize("count", [9, 10, 11])
def test_right_drafts_save_steps(count, monkeypatch):
    """Three of four tokens, also where the answer ends inside of a draft."""
    steps = []
    monkeypatch.setattr(GroupDrafts, "_draft", lambda self, row, length: known(row)[:length])

    def known(row):
        state = processors[0].active[row]
        return answers[tuple(state.initial_tokens)][len(state.generated_tokens) :]

    def step(model, pool, rows, ids):
        steps.append(ids.shape[1])
        return step_in_torch(model, pool, rows, ids)

    always_draft(monkeypatch)
    processors = pooled(monkeypatch, step)
    pairs = [alone(0, n, seed=n) for n in (9, 30)]
    answers = {tuple(prompt): answer for prompt, answer in pairs}
    outs = model_of().generate_batch(
        [prompt for prompt, _ in pairs],
        GenerationConfig(do_sample=False, max_new_tokens=count, prompt_lookup_num_tokens=3),
        ContinuousBatchingConfig(**{PAGE_SIZE: PAGE}, num_blocks=6, return_logprobs=True),
    )
    for out, (_, answer) in zip(outs.values(), pairs, strict=True):
        assert out.generated_tokens == answer[:count] and len(out.logprobs) == count
    assert steps == [4, 4, 4][: -(-(count - 1) // 4)]


def test_drafts_are_as_long_as_pays():
    """By the chances of all texts, and what steps of so many tokens take."""
    now = [0.0]
    drafts = GroupDrafts(7, 2, 64, lambda: now[0])
    for row in range(3):
        drafts.begin(row, [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2] if row else [1, 2, 3, 4], set())

    def measure(num_tokens, seconds):
        for _ in range(40):
            drafts.start(3, num_tokens)
            now[0] += seconds
            drafts.end()

    for num_tokens in (1, 2, 4, 8):
        measure(num_tokens, 1.0)
    drafts.chances.learn(2, [3, 4, 5, 6], [3, 4, 5, 6])
    assert drafts.choose([0, 1, 2]) == [[4] * 7, *2 * [[3, 4, 5, 6, 7, 8, 9]]]
    for num_tokens in (2, 4, 8):
        measure(num_tokens, 3.0 * num_tokens)
    assert drafts.choose([0, 1, 2]) == [[], [], []]
    drafts.most_tokens = 16  # of three texts, which count as four
    measure(1, 0.1)
    measure(4, 0.1)
    lengths = [{len(draft) for draft in drafts.choose([0, 1, 2])}]
    drafts.start(3, 4)
    now[0] += 100  # for another reason
    drafts.end()
    for _ in range(2):
        lengths.append({len(draft) for draft in drafts.choose([0, 1, 2])})
        for _ in range(20):
            measure(1, 0.1)
    assert lengths == [{3}, {0}, {3}]
