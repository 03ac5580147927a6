"""Any sequence of operations on a pool leaves each text what it is by itself.

A hypothesis state machine keeps a cache for each text; steps run in torch, on the pool's tensors
(`pool_steps.py`). CI runs a few examples, the same ones every time; for many:

    KIMI_MACHINE_EXAMPLES=2000 python -m pytest tests/cache/test_pool_machine.py -n 2 -q
"""

import functools
import os

import pytest
import torch
from builders import tiny_model, token_ids
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pool_steps import step_in_torch, taken_out
from tolerance import assert_close

from kimi_linear import KimiLinearCache
from kimi_linear.cache.pool import TextPool

pytestmark = pytest.mark.core

EXAMPLES = int(os.environ.get("KIMI_MACHINE_EXAMPLES", "10"))
PAGE = 32
seeds = st.integers(0, 10**6)
model_of = functools.cache(tiny_model)


class PoolMachine(RuleBasedStateMachine):
    """A pool, and a cache for each of its texts.

    Attributes:
        texts: By row: what has read the same tokens.
        before: By row: what had read the tokens before its last step, and that step's.
    """

    pattern = "hybrid"

    def __init__(self):
        super().__init__()
        self.texts, self.before = {}, {}
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def teardown(self):
        for row in list(self.texts):
            self.pool.free(row)
        pool = self.pool
        assert (pool.num_free_rows, pool.num_free_pages) == (pool.num_rows, pool.num_pages)
        assert not any(pool.lengths) and not any(pool._uses)
        torch.set_num_threads(self.threads)

    @initialize(
        num_rows=st.integers(1, 4),
        num_pages=st.integers(1, 9),
        rollback_tokens=st.sampled_from([0, 3, 16]),
    )
    def begin(self, num_rows, num_pages, rollback_tokens):
        self.model = model_of(self.pattern)
        place = {"dtype": torch.float32, "device": torch.device("cpu"), "page_tokens": PAGE}
        place["rollback_tokens"] = rollback_tokens
        self.pool = TextPool(self.model.config, num_rows, num_pages, **place)
        for x in self.pool._row_tensors():  # what a step of more rows than texts writes
            x[num_rows] = torch.nan
        for latents in self.pool.latents.values():
            latents[num_pages] = torch.nan

    def put(self, cache, like=None):
        """Into the pool, if there is room for it; which of it depends on what is shared."""
        pool, num_tokens = self.pool, cache.get_seq_length()
        shared = 0 if like is None else min(num_tokens, self.settled(like)) // PAGE
        has_room = pool.pages_for(num_tokens) - shared <= pool.num_free_pages
        if pool.num_free_rows and has_room:
            row = pool.add(cache, like=like)
            self.texts[row], self.before[row] = cache.fork(), None
            return
        with pytest.raises(RuntimeError, match="of the pool"):
            pool.add(cache, like=like)

    def settled(self, row):
        """Tokens that cannot be taken back."""
        before = self.before[row]
        is_pending = before is not None and self.pool.rollback_tokens
        return before[0].get_seq_length() if is_pending else self.pool.lengths[row]

    def row(self, data):
        return data.draw(st.sampled_from(sorted(self.texts)))

    @torch.no_grad()
    def read(self, num_tokens, seed, cache=None):
        if cache is None:
            cache = KimiLinearCache(self.model.config, rollback_tokens=0)
        self.model(token_ids(1, num_tokens, seed=seed), cache=cache)
        return cache

    @rule(num_tokens=st.integers(1, 3 * PAGE), seed=seeds)
    def add(self, num_tokens, seed):
        self.put(self.read(num_tokens, seed))

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), num_tokens=st.integers(1, 2 * PAGE), seed=seeds)
    def add_like(self, data, num_tokens, seed):
        """A text that begins with all of another."""
        row = self.row(data)
        self.put(self.read(num_tokens, seed, self.texts[row].fork()), like=row)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def fork(self, data):
        row, pool = self.row(data), self.pool
        missing = pool.pages_for(pool.lengths[row]) - self.settled(row) // PAGE
        if pool.num_free_rows and pool.num_free_pages >= missing:
            own = pool.fork(row)
            self.texts[own], self.before[own] = self.texts[row].fork(), self.before[row]
            return
        with pytest.raises(RuntimeError, match="of the pool"):
            pool.fork(row)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def free(self, data):
        row = self.row(data)
        self.pool.free(row)
        del self.texts[row], self.before[row]

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), count=st.integers(0, 16))
    def crop(self, data, count):
        """What the last step has read is as if it had not."""
        row, pool = self.row(data), self.pool
        pending = pool.lengths[row] - self.settled(row)
        if count > pending:
            with pytest.raises(ValueError, match=f"must be from 0 to {pending}, tokens of"):
                pool.crop(row, count)
            return
        pool.crop(row, count)
        if count:
            cache, ids = self.before[row]
            kept = ids[:, : ids.shape[1] - count]
            self.texts[row], self.before[row] = cache.fork(), (cache, kept)
            if kept.shape[1]:
                with torch.no_grad():
                    self.model(kept, cache=self.texts[row])

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), num_tokens=st.integers(1, 16), seed=seeds)
    @torch.no_grad()
    def step(self, data, num_tokens, seed):
        """Some texts go on, in any order; those that there is no page for stay what they are."""
        num_tokens = min(num_tokens, self.pool.rollback_tokens or num_tokens)
        chosen = data.draw(st.permutations(sorted(self.texts)))
        chosen = chosen[: data.draw(st.integers(1, len(chosen)))]
        rows = []
        for row in chosen:
            free, missing = self.pool.num_free_pages, self.missing_pages(row, num_tokens)
            has_grown = self.pool.grow(row, num_tokens)
            assert has_grown == (missing <= free)
            assert self.pool.num_free_pages == free - missing * has_grown
            rows += [row] * has_grown
        if not rows:
            return
        ids = token_ids(len(rows), num_tokens, seed=seed)
        logits = step_in_torch(self.model, self.pool, rows, ids)
        for i, row in enumerate(rows):
            self.before[row] = self.texts[row].fork(), ids[i : i + 1]
            expected = self.model(ids[i : i + 1], cache=self.texts[row]).logits[0]
            assert_close(logits[i], expected, torch.float32, f"row {row}")

    def missing_pages(self, row, num_tokens):
        """Pages that it has already may be more than its tokens need."""
        needed = self.pool.pages_for(self.pool.lengths[row] + num_tokens)
        return max(0, needed - len(self.pool._own_pages[row]))

    @invariant()
    def texts_are_what_they_are_by_themselves(self):
        for row, own in self.texts.items():
            found = taken_out(self.model, self.pool, row)
            assert found.get_seq_length() == own.get_seq_length()
            for one, other in zip(found.layers, own.layers, strict=True):
                if one.kind == "linear_attention":
                    pairs = zip(one.state.tensors(), other.state.tensors(), strict=True)
                else:
                    both = one.segments(), other.segments()
                    pairs = [[torch.cat(segments, dim=1) for segments in both]]
                for a, b in pairs:
                    assert_close(a, b, torch.float32, f"row {row}")

    @invariant()
    def pages_are_counted(self):
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        held = [page for row in self.texts for page in pool._own_pages[row]]
        assert [held.count(page) for page in range(pool.num_pages)] == pool._uses
        assert pool.num_free_pages == pool.num_pages - len(set(held))
        assert pool.num_free_rows == pool.num_rows - len(self.texts)


def machine(name):
    """The test of a machine for models of one pattern."""
    kind = type(f"PoolMachine_{name}", (PoolMachine,), {"pattern": name})
    kind.TestCase.settings = settings(
        max_examples=EXAMPLES,
        stateful_step_count=14,
        deadline=None,
        derandomize=EXAMPLES <= 10,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    return kind.TestCase


TestPoolOfHybrids = machine("hybrid")
TestPoolOfDeltaRules = machine("all_kda")
TestPoolOfLatents = machine("all_mla")
