"""Steps of several tokens a row beside the layers: logits, caches, tokens that are taken back."""

import pytest
import torch
from builders import token_ids
from decode_models import (  # noqa: F401
    DEVICES,
    allowed,
    check,
    check_logits,
    choices,
    decode_model,
    prepared,
    small_grids,
)
from late_devices import look_late

from kimi_linear import KimiLinearCache
from kimi_linear.cache.kda import KDALayerCache
from kimi_linear.cache.pending import STEP_TOKENS
from kimi_linear.cache.state import KDAState
from kimi_linear.decode import graph as graph_module
from kimi_linear.decode.addresses import counters
from kimi_linear.generation import lookup_loop

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted, pytest.mark.usefixtures("small_grids")]
each_device = pytest.mark.parametrize("device", DEVICES)
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=96)


def call(model, backend, ids, cache, **kwargs):
    model.decode_backend = backend
    return model(ids.to(model.device), cache=cache, **kwargs).logits


class Both:
    """The same calls by the layers and by recorded steps, each behind a cache of its own."""

    def __init__(self, model, num_rows, num_read, rollback_tokens=8):
        self.model, self.num_rows, self.seed = model, num_rows, 0
        first = KimiLinearCache(model.config, rollback_tokens=rollback_tokens)
        call(model, "eager", token_ids(num_rows, num_read), first)
        self.caches = {"eager": first, "graph": first.copy()}

    @property
    def states(self):
        return [self.caches[name].layers[0] for name in ("graph", "eager")]

    def read(self, num_tokens, **kwargs):
        self.seed += 1
        ids = token_ids(self.num_rows, num_tokens, seed=self.seed)
        own = call(self.model, "graph", ids, self.caches["graph"], **kwargs)
        with choices(self.model) as margins:
            other = call(self.model, "eager", ids, self.caches["eager"], **kwargs)
        check_logits(own, other, margins, f"call {self.seed}")
        return own

    def crop(self, count):
        for cache in self.caches.values():
            cache.crop(-count)

    def check_states(self):
        """The recurrent and the convolutions' states, after all that was read."""
        own, other = self.states
        own.settle()
        assert own.num_tokens == other.num_tokens
        check(own.state.recurrent, other.state.recurrent, "state")
        check(own.state.conv, other.state.conv, "convolution's state")


def used(monkeypatch):
    """The kinds of steps that run from now on."""
    kinds, record = [], graph_module.Recording

    def watched(own_model, kind, *group):
        kinds.append(kind)
        return record(own_model, kind, *group)

    monkeypatch.setattr(graph_module, "Recording", watched)
    return kinds


@each_device
@pytest.mark.parametrize("rollback_tokens", [0, 8], ids=["kept", "croppable"])
@pytest.mark.parametrize("num_rows", [1, 2])
@torch.no_grad()
def test_several_tokens_equal_the_layers(num_rows, rollback_tokens, device, monkeypatch):
    model = decode_model(device)
    kinds = used(monkeypatch)
    both = Both(model, num_rows, 7, rollback_tokens)
    for num_tokens in (3, 1, 2, 6):
        assert both.read(num_tokens).shape[:2] == (num_rows, num_tokens)
    assert [kind.num_tokens for kind in kinds] == [3, 1, 2, 6]
    both.check_states()


@each_device
@pytest.mark.parametrize("num_kept", [0, 1, 2, 4])
@torch.no_grad()
def test_tokens_of_the_last_step_are_taken_back(num_kept, device):
    """By counting: the state is not stale, and the next step goes on from what was kept."""
    both = Both(decode_model(device), 2, 7)
    both.read(4)
    if num_kept < 4:
        both.crop(4 - num_kept)
    state, _ = both.states
    assert not state.is_stale and state.pending.count == num_kept
    both.read(3)
    assert state.pending.count == 3 and state.num_tokens == 10 + num_kept
    both.crop(2)
    both.read(1)
    both.check_states()


@each_device
@torch.no_grad()
def test_more_than_the_last_step_is_taken_back(device):
    both = Both(decode_model(device), 1, 7)
    both.read(3)
    both.read(2)
    both.crop(4)
    state, _ = both.states
    assert state.is_stale and state.pending.count == 0
    for num_tokens in (2, 3):  # the layers read the log again, then steps go on
        both.read(num_tokens)
    both.check_states()


@each_device
@torch.no_grad()
def test_drafts_by_the_hundred(device):
    """Anchors move below steps of changing length, and a crop as far as promised is possible."""
    both = Both(decode_model(device), 1, 5, rollback_tokens=6)
    torch.manual_seed(0)
    for i in range(40):
        num_tokens = int(torch.randint(1, 6, ()))
        both.read(num_tokens)
        if num_tokens > 1 and i % 3:
            both.crop(int(torch.randint(1, num_tokens, ())))
    both.crop(6)
    both.read(2)
    both.check_states()


@each_device
@torch.no_grad()
def test_steps_without_pauses_stay_steps(device, monkeypatch):
    """Nothing reads the log again as long as only the last step's tokens are taken back."""
    both = Both(decode_model(device), 1, 20, rollback_tokens=6)
    state, _ = both.states
    monkeypatch.setattr(state, "read", None)  # what the layers would call
    for _ in range(12):
        both.read(4)
        both.crop(2)


@each_device
@torch.no_grad()
def test_forks_rows_and_layers_see_pending_tokens(device):
    both = Both(decode_model(device), 2, 7)
    both.read(4)
    both.crop(1)
    fork = both.caches["graph"].fork()
    both.caches = {"eager": both.caches["eager"].fork(), "graph": fork}
    both.read(2)
    for cache in both.caches.values():
        cache.reorder_cache(torch.tensor([1, 0], device=both.model.device))
    both.read(STEP_TOKENS + 1)  # by the layers
    both.read(3)
    both.check_states()


@each_device
@torch.no_grad()
def test_sessions_hold_pending_tokens(device, tmp_path):
    both = Both(decode_model(device), 1, 7)
    both.read(4)
    both.crop(1)
    model, cache = both.model, both.caches["graph"]
    model.save_session(tmp_path / "a.session", cache)
    both.caches["graph"] = model.load_session(tmp_path / "a.session").cache
    both.read(2)
    both.check_states()


@each_device
@torch.no_grad()
def test_padding_stays_out_of_several_tokens(device):
    model, ids = decode_model(device), token_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask = mask.to(model.device)
    caches = {name: KimiLinearCache(model.config) for name in ("eager", "graph")}
    logits = {}
    for name, cache in caches.items():
        call(model, "eager", ids, cache, attention_mask=mask)
        more = torch.nn.functional.pad(mask, (0, 3), value=1)
        logits[name] = call(model, name, token_ids(2, 3, seed=1), cache, attention_mask=more)
    check(logits["graph"], logits["eager"])


@each_device
@torch.no_grad()
def test_tokens_see_those_before_them_alone(device):
    """A step's later tokens change nothing at the earlier ones."""
    model = decode_model(device)
    first = KimiLinearCache(model.config)
    call(model, "eager", token_ids(1, 7), first)
    ids, logits = token_ids(1, 4, seed=1), []
    for last in (3, 5):
        ids[0, -1] = last
        logits.append(call(model, "graph", ids, first.copy()))
    assert torch.equal(logits[0][:, :-1], logits[1][:, :-1])
    assert not torch.equal(logits[0], logits[1])


@each_device
@torch.no_grad()
def test_logits_to_keep(device):
    both = Both(decode_model(device), 1, 7)
    assert both.read(4, logits_to_keep=2).shape[1] == 2


@each_device
@pytest.mark.parametrize("how", ["prompt_lookup_num_tokens", "assistant_model"])
def test_drafts_give_the_greedy_text(how, device, monkeypatch):
    model = decode_model(device)
    ids = token_ids(1, 6).to(model.device).repeat(1, 3)
    model.decode_backend = "eager"
    start = ids.shape[1]
    greedy = model.generate(ids, max_new_tokens=16, **GREEDY)[0, start:].tolist()
    model.decode_backend = "auto"
    kinds = used(monkeypatch)
    if device == "cpu":
        look_late(monkeypatch, lookup_loop)
    options = {how: 4 if how.startswith("prompt") else decode_model(device, 1)}
    found = model.generate(ids, max_new_tokens=16, **options, **GREEDY)[0, start:].tolist()
    assert found == allowed(model, ids[0].tolist(), found, greedy)
    assert max(kind.num_tokens for kind in kinds) > 1


@pytest.mark.parametrize("rollback_tokens", [0, 8])
def test_counters_go_on_as_the_step_counts(rollback_tokens):
    """Without a log too: a counter that is loaded again costs every step a launch."""
    model = decode_model("cpu")
    cache = KimiLinearCache(model.config, rollback_tokens=rollback_tokens)
    with torch.no_grad():
        call(model, "eager", token_ids(1, 7), cache)
    kda = cache.layers[:1]
    before = counters(cache.layers[0], kda)
    for layer in cache.layers:
        layer.count_step(1)
    after = counters(cache.layers[0], kda)
    assert after == before._replace(cached=before.cached + 1, logged=before.logged + 1)


@torch.no_grad()
def test_rows_in_another_order_have_room_for_no_pending_tokens():
    """Beam search would otherwise take one in for each of its steps, and the next would wait again:
    in a dozen launches by layer."""
    cache = KDALayerCache(8)
    cache.state = KDAState(torch.ones(2, 3, 32, 3), torch.ones(2, 2, 16, 16))
    cache.pending.reserve(cache.state, 4)
    cache.num_tokens = 9
    cache.count_step(1)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.count_step(1)
    assert cache.pending.count == 0 and not cache.pending.tensors()


@each_device
@torch.no_grad()
def test_offloaded_caches_are_left_to_the_layers(device, monkeypatch):
    """Nothing is made ready for steps that cannot be."""
    model = decode_model(device)
    cache = KimiLinearCache(model.config, rollback_tokens=8, offload=True)
    call(model, "eager", token_ids(1, 7), cache)
    monkeypatch.setattr(graph_module, "catch_up", None)
    for num_tokens in (3, 2):
        call(model, "auto", token_ids(1, num_tokens), cache)
        cache.crop(-1)
    assert cache.layers[0].pending.updates is None
