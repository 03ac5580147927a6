"""Steps over a pool of texts of different lengths beside each text by itself, layer by layer."""

import pytest
import torch
from builders import token_ids
from decode_models import DEVICES, check, decode_model, small_grids  # noqa: F401

from kimi_linear import KimiLinearCache
from kimi_linear.cache.pool import TextPool
from kimi_linear.decode import graph
from kimi_linear.ops.runtime import TritonError

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted, pytest.mark.usefixtures("small_grids")]
each_device = pytest.mark.parametrize("device", DEVICES)
PAGE = 32


class Texts:
    """Texts in a pool, and in caches of their own."""

    def __init__(self, model, num_rows=4, num_pages=12, rollback_tokens=0):
        self.model = model
        model.decode_backend = "eager"
        options = {"dtype": model.dtype, "device": model.device, "page_tokens": PAGE}
        options["rollback_tokens"] = rollback_tokens
        self.pool = TextPool(model.config, num_rows, num_pages, **options)
        self.caches = {}
        self.seed = 0

    def ids(self, *shape):
        self.seed += 1
        return token_ids(*shape, seed=self.seed).to(self.model.device)

    def read(self, num_tokens):
        cache = KimiLinearCache(self.model.config)
        self.model(self.ids(1, num_tokens), cache=cache)
        return cache

    def add(self, num_tokens):
        cache = self.read(num_tokens)
        row = self.pool.add(cache)
        self.caches[row] = cache
        return row

    def fork(self, row):
        own = self.pool.fork(row)
        self.caches[own] = self.caches[row].fork()
        return own

    def free(self, row):
        self.pool.free(row)
        del self.caches[row]

    def crop(self, row, num_tokens):
        self.pool.crop(row, num_tokens)
        self.caches[row].crop(-num_tokens)

    def step(self, rows=None, num_tokens=1):
        rows = list(self.caches) if rows is None else rows
        ids = self.ids(len(rows), num_tokens)
        assert all(self.pool.grow(row, num_tokens) for row in rows)
        logits = graph.decode_pool(self.model, self.pool, rows, ids)
        for i, row in enumerate(rows):
            expected = self.model(ids[i : i + 1], cache=self.caches[row]).logits[0]
            check(logits[i], expected, f"row {row}")


@each_device
@torch.no_grad()
def test_texts_of_different_lengths(device):
    texts = Texts(decode_model(device))
    for num_tokens in (5, 2 * PAGE - 1, PAGE):
        texts.add(num_tokens)
    for _ in range(3):
        texts.step()
    texts.step([2, 0])  # some of them, in another order


@each_device
@pytest.mark.parametrize("rollback_tokens", [0, 4])
@torch.no_grad()
def test_several_tokens_of_each_text(rollback_tokens, device):
    """Some are taken back, of each text another number, also behind the beginning of a page."""
    texts = Texts(decode_model(device), rollback_tokens=rollback_tokens)
    for num_tokens in (5, 2 * PAGE - 1, PAGE - 3):
        texts.add(num_tokens)
    texts.step(num_tokens=4)
    if rollback_tokens:
        for row, count in enumerate((1, 4, 2)):
            texts.crop(row, count)
    texts.step()
    texts.step([2, 0], num_tokens=3)
    if rollback_tokens:
        texts.crop(0, 3)
        with pytest.raises(ValueError, match="num_tokens=1 is not allowed: it must be from 0 to 0"):
            texts.pool.crop(0, 1)
        own = texts.fork(2)
        texts.crop(own, 2)  # another end than that of the text which it goes on from
        texts.step([own, 2], num_tokens=2)
    texts.step()


@each_device
@torch.no_grad()
def test_a_page_is_shared_when_nothing_of_it_is_taken_back(device):
    texts = Texts(decode_model(device), rollback_tokens=4)
    first = texts.add(PAGE - 3)
    texts.step(num_tokens=3)  # fills the page
    second = texts.fork(first)
    texts.crop(first, 2)
    texts.step([first], num_tokens=2)
    texts.step([second])
    free = texts.pool.num_free_pages
    texts.fork(second)
    assert texts.pool.num_free_pages == free - 1


@torch.no_grad()
def test_steps_that_are_too_long():
    texts = Texts(decode_model("cpu"), rollback_tokens=4)
    row = texts.add(3)
    for num_tokens in (0, 5):
        with pytest.raises(
            ValueError, match=rf"ids has {num_tokens} tokens a text.*there must be 1 to 4"
        ):
            graph.decode_pool(texts.model, texts.pool, [row], texts.ids(1, num_tokens))
    with pytest.raises(ValueError, match="rollback_tokens=17 is not allowed: it must be from 0 to"):
        Texts(texts.model, rollback_tokens=17)


@each_device
@torch.no_grad()
def test_texts_come_and_go(device):
    texts = Texts(decode_model(device))
    first, second = texts.add(PAGE + 4), texts.add(7)
    texts.step()
    texts.free(first)
    texts.step()
    assert texts.add(3 * PAGE) == first  # into the row that is free again
    third = texts.fork(second)
    texts.step()
    texts.step([third, first])
    for row in list(texts.caches):
        texts.free(row)
    pool = texts.pool
    assert (pool.num_free_rows, pool.num_free_pages) == (pool.num_rows, pool.num_pages)
    assert not any(pool._uses) and not any(pool.lengths)


@each_device
@torch.no_grad()
def test_forks_share_whole_pages(device):
    texts = Texts(decode_model(device))
    first = texts.add(2 * PAGE + 3)
    free = texts.pool.num_free_pages
    second = texts.fork(first)
    assert texts.pool.num_free_pages == free - 1
    texts.step()
    texts.step([second])
    texts.free(first)  # the other one keeps what it needs
    texts.step()


@each_device
@torch.no_grad()
def test_a_text_with_the_beginning_of_another(device):
    texts = Texts(decode_model(device))
    prefix = texts.read(2 * PAGE + 5)
    own = prefix.fork()
    texts.model(texts.ids(1, 9), cache=own)
    first, free = texts.pool.add(prefix), texts.pool.num_free_pages
    second = texts.pool.add(own, like=first)
    assert texts.pool.num_free_pages == free - 1
    texts.caches = {first: prefix, second: own}
    texts.step()


@each_device
@torch.no_grad()
def test_neighbours_do_not_matter(device):
    """The same text among others gives the same bits, whatever they are."""
    model, results = decode_model(device), []
    for others in ((3,), (PAGE, 50)):
        texts = Texts(model)
        row = texts.add(20)
        texts.seed = sum(others)
        rows = [row, *(texts.add(n) for n in others)]
        ids = torch.full((len(rows),), 7, device=model.device)
        assert all(texts.pool.grow(each, 1) for each in rows)
        # as many rows in both, since their number decides how weights are read
        rows, ids = rows[:2], ids[:2]
        results.append(graph.decode_pool(model, texts.pool, rows, ids)[0])
    assert torch.equal(*results)


@each_device
@torch.no_grad()
def test_steps_are_recorded_before_texts_are_there(device, monkeypatch):
    model = decode_model(device)
    texts = Texts(model, num_rows=3)
    for num_rows in (1, 3, 2, 1):
        graph.record_pool(model, texts.pool, num_rows)
    kinds = [(step.num_rows, step.num_tokens) for step in graph.recorded_steps(model)]
    assert kinds == [(4, 1), (2, 1), (1, 1)]
    monkeypatch.setattr(graph, "Recording", None)
    for num_tokens in (5, PAGE, 3):
        texts.add(num_tokens)
        texts.step()


@each_device
@torch.no_grad()
def test_what_cannot_be_recorded_beforehand_is_no_obstacle(device, monkeypatch):
    """Until such a step comes: few texts may be all there ever are."""
    model, record = decode_model(device), graph.Recording
    texts = Texts(model)

    def failing(model, kind, *group):
        if kind.num_sequences > 2:
            raise TritonError
        return record(model, kind, *group)

    monkeypatch.setattr(graph, "Recording", failing)
    graph.record_pool(model, texts.pool, 4)
    texts.add(5), texts.add(3)
    texts.step()
    model.config.num_hidden_layers -= 1  # an early exit, which no step has
    graph.record_pool(model, texts.pool, 1)
    assert [step.num_rows for step in graph.recorded_steps(model)] == [2]


@torch.no_grad()
def test_a_pool_that_was_made_in_inference_mode():
    """It is written to outside of it, by a thread for example, which does not inherit the mode."""
    model = decode_model("cpu")
    with torch.inference_mode():
        texts = Texts(model)
    row = texts.add(3)
    assert texts.pool.grow(row, PAGE)
    texts.fork(row)


@torch.no_grad()
def test_what_there_is_no_room_for():
    texts = Texts(decode_model("cpu"), num_rows=2, num_pages=3)
    row, long = texts.add(2 * PAGE), texts.read(2 * PAGE + 1)
    with pytest.raises(RuntimeError, match=r"needs 3 pages of 32 tokens, and 1 of the pool's 3"):
        texts.pool.add(long)
    assert texts.pool.num_free_rows == 1
    assert texts.pool.grow(row, PAGE) and not texts.pool.grow(row, 2 * PAGE)
    texts.free(row)
    texts.add(3), texts.add(4)
    with pytest.raises(RuntimeError, match="all 2 rows of the pool are taken"):
        texts.add(3)
    with pytest.raises(ValueError, match="num_pages=0 is not allowed: it must be at least 1"):
        TextPool(texts.model.config, 1, 0, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(
        ValueError, match="page_tokens=48 is not allowed: it must be a multiple of 32"
    ):
        TextPool(
            texts.model.config,
            1,
            1,
            dtype=torch.float32,
            device=torch.device("cpu"),
            page_tokens=48,
        )


@each_device
@torch.no_grad()
def test_a_text_that_cannot_be_copied_takes_nothing(device, monkeypatch):
    texts = Texts(decode_model(device))
    cache, pool = texts.read(PAGE + 4), texts.pool
    monkeypatch.setattr(pool, "_copy", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pool.add(cache)
    assert (pool.num_free_rows, pool.num_free_pages) == (pool.num_rows, pool.num_pages)
