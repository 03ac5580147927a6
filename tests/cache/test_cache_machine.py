"""Any sequence of operations on a cache leaves what reading the tokens' history would leave.

A hypothesis state machine keeps the history that each row should have, column by column, with its
padding; after every call it compares the logits with those of one forward over that history without
a cache. CI runs a few examples, the same ones every time. For many, about a second each:

    KIMI_MACHINE_EXAMPLES=2000 python -m pytest tests/test_cache_machine.py -n 2 -q

A failure prints the operations that led to it, shortened; put them into a test of their own.
"""

import functools
import os
import tempfile
from pathlib import Path

import pytest
import torch
from builders import PATTERNS, tiny_model
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tolerance import assert_close

from kimi_linear import KimiLinearCache

pytestmark = [pytest.mark.core, pytest.mark.kernels]

EXAMPLES = int(os.environ.get("KIMI_MACHINE_EXAMPLES", "10"))
STEPS = 12
MAX_ROWS, MAX_TOKENS = 4, 160
seeds = st.integers(0, 10**6)
model_of = functools.cache(tiny_model)


class CacheMachine(RuleBasedStateMachine):
    """A cache and the history that it should stand for.

    Attributes:
        pattern: Which layers the model has.
        ids, mask: [B, S] what each row has read, zeros in the mask at padding.
    """

    pattern = "hybrid"

    def __init__(self):
        super().__init__()
        self.cache = None
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more only wait for each other at this size

    def teardown(self):
        torch.set_num_threads(self.threads)

    @initialize(
        rows=st.integers(1, MAX_ROWS),
        rollback_tokens=st.sampled_from([0, 3, 8, 64]),
        reserve_tokens=st.sampled_from([0, 40]),
        offload=st.booleans(),
    )
    def begin(self, rows, rollback_tokens, reserve_tokens, offload):
        self.model = model_of(self.pattern)
        self.cache = KimiLinearCache(
            self.model.config,
            rollback_tokens=rollback_tokens,
            reserve_tokens=reserve_tokens,
            offload=offload,
        )
        self.forget(rows)

    def forget(self, rows):
        self.ids = torch.zeros(rows, 0, dtype=torch.long)
        self.mask = torch.zeros(rows, 0, dtype=torch.long)

    @property
    def rows(self):
        return self.ids.shape[0]

    def read(self, count, seed, paddings=None):
        """Read `count` columns with the cache, and the whole history without; compare."""
        generator = torch.Generator().manual_seed(seed)
        new = torch.randint(0, 94, (self.rows, count), generator=generator)
        real = torch.ones_like(new)
        if paddings is not None:
            real = (torch.rand(new.shape, generator=generator) > paddings).long()
        self.ids = torch.cat([self.ids, new], dim=1)
        self.mask = torch.cat([self.mask, real], dim=1)
        padded = bool((self.mask == 0).any()) or self.cache.layers[0].has_padding
        mask = self.mask if padded else None
        with torch.no_grad():
            out = self.model(new, attention_mask=mask, cache=self.cache).logits
            whole = self.model(self.ids, attention_mask=mask, use_cache=False).logits
        seen = real.bool()
        if seen.any():
            assert_close(out[seen], whole[:, -count:][seen], torch.float32)

    def has_room(self):
        return self.ids.shape[1] < MAX_TOKENS

    @rule(count=st.integers(2, 40), seed=seeds)
    @precondition(has_room)
    def prefill(self, count, seed):
        self.read(count, seed)

    @rule(count=st.integers(1, 3), seed=seeds)
    @precondition(has_room)
    def steps(self, count, seed):
        for i in range(count):
            self.read(1, seed + i)

    @rule(count=st.integers(2, 6), seed=seeds)
    @precondition(has_room)
    def several_tokens_at_once(self, count, seed):
        self.read(count, seed)

    @rule(count=st.integers(1, 30), seed=seeds, share=st.sampled_from([0.2, 0.5, 0.9]))
    @precondition(has_room)
    def padded(self, count, seed, share):
        self.read(count, seed, share)

    @rule(share=st.floats(0, 1))
    @precondition(lambda self: self.ids.shape[1] > 0)
    def crop(self, share):
        """To any length that was kept; beyond it, an error that changes nothing."""
        length = self.ids.shape[1]
        kept = [
            layer.rollback.num_logged for layer in self.cache.layers if hasattr(layer, "rollback")
        ]
        most = length if not kept else kept[0] or 0
        if most < length:
            try:
                self.cache.crop(-most - 1)
            except ValueError:
                pass
            else:
                raise AssertionError("a crop beyond what was kept is no error")
        removed = round(share * most)
        self.cache.crop(-removed)
        self.ids, self.mask = (x[:, : length - removed] for x in (self.ids, self.mask))

    @rule(seed=seeds)
    def reorder(self, seed):
        self.choose(self.cache.reorder_cache, self.rows, seed)

    @rule(seed=seeds, rows=st.integers(1, MAX_ROWS))
    def select(self, seed, rows):
        self.choose(self.cache.batch_select_indices, rows, seed)

    def choose(self, operation, rows, seed):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(0, self.rows, (rows,), generator=generator)
        operation(chosen)
        self.ids, self.mask = self.ids[chosen], self.mask[chosen]

    @rule(repeats=st.integers(1, MAX_ROWS))
    @precondition(lambda self: self.rows * 2 <= MAX_ROWS)
    def repeat(self, repeats):
        repeats = min(repeats, MAX_ROWS // self.rows)
        self.cache.batch_repeat_interleave(repeats)
        self.ids, self.mask = (x.repeat_interleave(repeats, dim=0) for x in (self.ids, self.mask))

    @rule()
    @precondition(lambda self: self.ids.shape[1] > 0)
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "session.safetensors"
            self.model.save_session(path, self.cache, self.ids)
            self.cache, ids = self.model.load_session(path)
        assert torch.equal(ids, self.ids)

    @rule(follow=st.booleans(), seed=seeds)
    @precondition(has_room)
    def fork(self, follow, seed):
        """Go on with either; what the other one reads must not be seen."""
        other = self.cache.fork()
        if not follow:
            self.cache, other = other, self.cache
        ids, mask, cache = self.ids, self.mask, self.cache
        self.cache = other
        self.read(3, seed)
        self.ids, self.mask, self.cache = ids, mask, cache

    @rule()
    def copy(self):
        old, self.cache = self.cache, self.cache.copy()
        old.reset()

    @rule(tokens=st.sampled_from([3, 20]))
    def record_from_now_on(self, tokens):
        self.cache.activate_past_recording()
        for layer in self.cache.layers:  # few enough that an anchor moves now and then
            if hasattr(layer, "rollback"):
                layer.rollback.tokens = min(layer.rollback.num_logged or 0, tokens)

    @rule(rows=st.integers(1, MAX_ROWS))
    def reset(self, rows):
        self.cache.reset()
        self.forget(rows)

    @invariant()
    def counts(self):
        if self.cache is not None:
            assert self.cache.get_seq_length() == self.ids.shape[1]
            rows = self.cache.layers[0].num_rows
            assert rows in (None, self.rows)

    @invariant()
    def memory(self):
        """Never more than one block of latents above need."""
        if self.cache is None:
            return
        config = self.model.config
        per_token = 4 * (config.kv_lora_rank + config.qk_rope_head_dim)
        needed = max(self.ids.shape[1], 40) + 256
        layers = config.layer_types.count("full_attention")
        held = self.cache.cache_memory()["full_attention"]
        assert held <= self.rows * layers * needed * per_token


def test_case(pattern):
    """The machine for one pattern of layers, as pytest collects it."""
    machine = type(f"CacheMachine_{pattern}", (CacheMachine,), {"pattern": pattern})
    machine.TestCase.settings = settings(
        max_examples=max(1, EXAMPLES // len(PATTERNS)),
        stateful_step_count=STEPS,
        deadline=None,
        derandomize="KIMI_MACHINE_EXAMPLES" not in os.environ,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    return machine.TestCase


TestHybrid = test_case("hybrid")
TestAllKDA = test_case("all_kda")
TestAllMLA = test_case("all_mla")
TestAlternating = test_case("alternating")
TestMLAFirst = test_case("mla_first")
del test_case
