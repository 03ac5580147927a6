"""A text's first call by a recorded graph beside the layers: logits, caches, and which calls it
leaves to them."""

import pytest
import torch
from builders import token_ids
from decode_models import DEVICES, check, decode_model, small_grids  # noqa: F401

from kimi_linear import KimiLinearCache
from kimi_linear.decode import graph, prompts
from kimi_linear.decode.prompts import RecordedPrompt, recorded_tokens

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted, pytest.mark.usefixtures("small_grids")]
each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture
def sizes(monkeypatch):
    """The recordings that are made from now on, by their tokens."""
    found, make = [], RecordedPrompt.__init__
    monkeypatch.setattr(
        RecordedPrompt,
        "__init__",
        lambda self, model, size, pool: (found.append(size), make(self, model, size, pool))[1],
    )
    return found


def empty(model, **options):
    return KimiLinearCache(model.config, **{"rollback_tokens": 0, **options})


@torch.no_grad()
def read(model, ids, backend="auto", cache=None, **kwargs):
    """The logits of a first call, and its cache."""
    model.decode_backend = backend
    cache = empty(model) if cache is None else cache
    logits = model(ids, cache=cache, use_cache=True, **kwargs).logits
    return logits, cache


def test_texts_are_rounded_up_by_an_eighth_at_most():
    assert [recorded_tokens(n) for n in (17, 64, 65, 1024, 1025, 2049, 4096)] == [
        *(64, 64, 128, 1024, 1152, 2304, 4096)
    ]
    sizes = {n: recorded_tokens(n) for n in range(17, 4097)}
    assert all(n <= size <= max(n + 63, 1.125 * n) for n, size in sizes.items())
    assert len(set(sizes.values())) == 32


@each_device
@pytest.mark.parametrize("num_tokens", [17, 63, 64, 65, 190])
def test_a_text_is_read_as_by_the_layers(num_tokens, device, sizes):
    model = decode_model(device)
    for seed in range(3):  # the first makes no recording, the third finds what others left in it
        ids = token_ids(1, num_tokens - seed % 2, seed=seed).to(model.device)
        (own, cache), (other, expected) = read(model, ids), read(model, ids, "eager")
        check(own, other, "logits")
        for layer, known in zip(cache.layers, expected.layers, strict=True):
            assert layer.num_tokens == known.num_tokens == ids.shape[1]
        check(cache.layers[0].state.recurrent, expected.layers[0].state.recurrent, "state")
        check(cache.layers[0].state.conv, expected.layers[0].state.conv, "convolution's state")
        check(cache.layers[1].segments()[0], expected.layers[1].segments()[0], "latents")
        new = token_ids(1, 20, seed=9).to(model.device)  # by the layers, from there on
        check(read(model, new, cache=cache)[0], read(model, new, "eager", expected)[0], "more")
    assert set(sizes) == {recorded_tokens(num_tokens)} and len(sizes) == 1


@each_device
def test_texts_do_not_share_memory(device, sizes):
    model = decode_model(device)
    ids = [token_ids(1, 40, seed=seed).to(model.device) for seed in range(4)]
    caches = [read(model, x)[1] for x in ids]
    assert sizes == [64]
    for x, cache in zip(ids, caches, strict=True):
        new = token_ids(1, 20, seed=9).to(model.device)
        expected = read(model, torch.cat([x, new], dim=1), "eager")[0][:, 40:]
        check(read(model, new, cache=cache)[0], expected)


@each_device
def test_last_logits_and_masks_that_say_nothing(device, sizes):
    model = decode_model(device)
    ids = token_ids(1, 40).to(model.device)
    whole = read(model, ids, "eager")[0]
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(40)[None]}
    given = {name: x.to(model.device) for name, x in given.items()}
    for kept in (0, 1, 3):
        own, _ = read(model, ids, logits_to_keep=kept, **given)
        check(own, whole[:, -kept:])
    assert sizes == [64]


@each_device
def test_generate_reads_its_prompt_so(device, sizes):
    model = decode_model(device)
    ids = token_ids(1, 40).to(model.device)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 96}
    model.decode_backend = "eager"
    expected = model.generate(ids, **options)
    model.decode_backend = "auto"
    for _ in range(3):
        assert torch.equal(model.generate(ids, **options), expected)
    assert sizes == [64]


def with_zeros(ids):
    return {"attention_mask": (torch.arange(ids.shape[1]) > 2).long()[None].to(ids.device)}


@each_device
@pytest.mark.parametrize(
    "case",
    [
        *("two rows", "padding", "packed", "cropped", "few", "many", "used", "eager", "training"),
        "another attention",
    ],
)
def test_what_the_layers_read(case, device, sizes, monkeypatch):
    model = decode_model(device)
    monkeypatch.setattr(prompts, "MOST_TOKENS", 50)
    shape = {"two rows": (2, 40), "few": (1, 16), "many": (1, 51)}.get(case, (1, 40))
    ids = token_ids(*shape).to(model.device)
    more = with_zeros(ids) if case == "padding" else {}
    if case == "packed":
        more = {"position_ids": (torch.arange(40) % 30)[None].to(model.device)}
    backend = "eager" if case == "eager" else "auto"
    model.train(case == "training")
    if case == "another attention":
        model.set_attn_implementation("eager")
    for _ in range(3):
        cache = empty(model, rollback_tokens=8 if case == "cropped" else 0)
        if case == "used":
            read(model, ids[:, :3], cache=cache)
        if case == "packed":
            with pytest.raises(ValueError, match="pack"):
                read(model, ids, backend, cache, **more)
            continue
        read(model, ids, backend, cache, **more)
    assert not sizes


@each_device
def test_changed_weights_are_recorded_anew(device, sizes):
    model = decode_model(device)
    ids = token_ids(1, 40).to(model.device)
    for i in range(4):
        if i == 2:
            linear = model.model.layers[1].self_attn.o_proj
            linear.weight = torch.nn.Parameter(-2 * linear.weight.detach())
        check(read(model, ids)[0], read(model, ids, "eager")[0])
    assert sizes == [64, 64]


@each_device
def test_memory_that_is_short(device, sizes, monkeypatch):
    """For a recording, or for what it needs when it is made: the layers read the text."""
    model = decode_model(device)
    ids = token_ids(1, 40).to(model.device)
    monkeypatch.setattr(prompts, "_has_memory", lambda device: False)
    expected = read(model, ids)[0]
    read(model, ids)
    assert not sizes
    monkeypatch.setattr(prompts, "_has_memory", lambda device: True)

    def fail(self, *args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(RecordedPrompt, "_run", fail)
    if device == "cuda":
        check(read(model, ids)[0], expected)
    assert not graph.recorded_steps(model)
