"""A text's first call by a recorded graph beside the layers: logits, caches, and which calls it
leaves to them."""

import pytest
import torch
from builders import token_ids
from decode_models import DEVICES, allowed, check, check_logits, choices, decode_model, small_grids  # noqa: F401
from packed_models import every_part

from kimi_linear import KimiLinearCache
from kimi_linear.decode import graph, prompts
from kimi_linear.decode.prompts import RecordedPrompt, least_tokens, recorded_tokens
from kimi_linear.ops import projections
from kimi_linear.ops.chip import architecture
from kimi_linear.ops.packed.library import has_block_products
from kimi_linear.ops.runtime import TritonError
from kimi_linear.quantization.packing import pack_rest
from kimi_linear.schemes import Scheme

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


def compare(model, ids, logits, cache=None, **kwargs):
    """Logits are those of the layers, whose cache this returns."""
    with choices(model) as margins:
        expected, cache = read(model, ids, "eager", cache, **kwargs)
    check_logits(logits, expected, margins)
    return cache


def test_texts_are_rounded_up_by_an_eighth_at_most():
    assert [recorded_tokens(n) for n in (17, 64, 65, 1024, 1025, 2049, 4096)] == [
        *(64, 64, 128, 1024, 1152, 2304, 4096)
    ]
    # no text's activations are in float8 but those of texts that are long enough
    assert [recorded_tokens(n) for n in (193, 255, 256, 1921, 2047, 2048)] == [
        *(255, 255, 256, 2047, 2047, 2048)
    ]
    sizes = {n: recorded_tokens(n) for n in range(17, 4097)}
    assert all(n <= size <= max(n + 63, 1.125 * n) for n, size in sizes.items())
    assert len(set(sizes.values())) == 34
    for size in set(sizes.values()):
        assert least_tokens(size) == min(n for n in sizes if sizes[n] == size)


@each_device
@pytest.mark.parametrize("num_tokens", [17, 63, 64, 65, 190])
def test_a_text_is_read_as_by_the_layers(num_tokens, device, sizes):
    model = decode_model(device)
    for seed in range(3):  # the first makes no recording, the third finds what others left in it
        ids = token_ids(1, num_tokens - seed % 2, seed=seed).to(model.device)
        own, cache = read(model, ids)
        expected = compare(model, ids, own)
        for layer, known in zip(cache.layers, expected.layers, strict=True):
            assert layer.num_tokens == known.num_tokens == ids.shape[1]
        check(cache.layers[0].state.recurrent, expected.layers[0].state.recurrent, "state")
        check(cache.layers[0].state.conv, expected.layers[0].state.conv, "convolution's state")
        check(cache.layers[1].segments()[0], expected.layers[1].segments()[0], "latents")
        new = token_ids(1, 20, seed=9).to(model.device)  # by the layers, from there on
        compare(model, new, read(model, new, cache=cache)[0], expected)
    assert set(sizes) == {recorded_tokens(num_tokens)} and len(sizes) == 1


@each_device
def test_texts_do_not_share_memory(device, sizes):
    model = decode_model(device)
    ids = [token_ids(1, 40, seed=seed).to(model.device) for seed in range(4)]
    caches = [read(model, x)[1] for x in ids]
    assert sizes == [64]
    for x, cache in zip(ids, caches, strict=True):
        new = token_ids(1, 20, seed=9).to(model.device)
        _, expected = read(model, x, "eager")
        compare(model, new, read(model, new, cache=cache)[0], expected)


@each_device
def test_last_logits_and_masks_that_say_nothing(device, sizes):
    model = decode_model(device)
    ids = token_ids(1, 40).to(model.device)
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(40)[None]}
    given = {name: x.to(model.device) for name, x in given.items()}
    for kept in (0, 1, 3):
        own, _ = read(model, ids, logits_to_keep=kept, **given)
        compare(model, ids, own, logits_to_keep=kept)
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
        found = model.generate(ids, **options)[0].tolist()
        assert found[40:] == allowed(model, found[:40], found[40:], expected[0, 40:].tolist())
    assert sizes == [64]


class Wrapped(torch.nn.Module):
    """A module in another one, whose parameters are not where they were."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def with_zeros(ids):
    return {"attention_mask": (torch.arange(ids.shape[1]) > 2).long()[None].to(ids.device)}


@each_device
@pytest.mark.parametrize(
    "case",
    [
        *("two rows", "padding", "packed", "cropped", "few", "many", "used", "eager", "training"),
        *("another attention", "hidden states", "chosen logits", "labels", "autocast", "hook"),
        *("gradients", "fewer layers", "wrapped experts"),
    ],
)
def test_what_the_layers_read(case, device, sizes, monkeypatch):
    model = decode_model(device)
    monkeypatch.setattr(graph, "MOST_TOKENS", 50)
    shape = {"two rows": (2, 40), "few": (1, 16), "many": (1, 51)}.get(case, (1, 40))
    ids = token_ids(*shape).to(model.device)
    more = with_zeros(ids) if case == "padding" else {}
    if case == "packed":
        more = {"position_ids": (torch.arange(40) % 30)[None].to(model.device)}
    backend = "eager" if case == "eager" else "auto"
    model.train(case == "training")
    if case == "another attention":
        model.set_attn_implementation("eager")
    if case == "hook":
        model.model.norm.register_forward_hook(lambda *args: None)
    if case == "fewer layers":
        model.config.num_hidden_layers = 1
    if case == "wrapped experts":  # as PEFT does
        moe = model.model.layers[1].block_sparse_moe
        moe.experts = Wrapped(moe.experts)
    more |= {
        "hidden states": {"output_hidden_states": True},
        "chosen logits": {"logits_to_keep": torch.tensor([3], device=model.device)},
        "labels": {"labels": ids},
    }.get(case, {})
    for _ in range(3):
        cache = empty(model, rollback_tokens=8 if case == "cropped" else 0)
        if case == "used":
            read(model, ids[:, :3], cache=cache)
        if case == "packed":
            with pytest.raises(ValueError, match="pack"):
                read(model, ids, backend, cache, **more)
            continue
        if case == "gradients":
            model(ids, cache=cache, use_cache=True)
            continue
        other = torch.float16 if device == "cuda" else torch.bfloat16  # than the weights'
        with torch.autocast(device, other, enabled=case == "autocast"):
            read(model, ids, backend, cache, **more)
    assert not sizes


@each_device
def test_ids_that_no_embedding_takes(device, sizes):
    model = decode_model(device)
    for _ in range(3):
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            read(model, token_ids(1, 40).to(model.device, torch.int16))
    assert not sizes


@each_device
def test_changed_weights_are_recorded_anew(device, sizes):
    model = decode_model(device)
    ids = token_ids(1, 40).to(model.device)
    for i in range(4):
        if i == 2:
            linear = model.model.layers[1].self_attn.o_proj
            linear.weight = torch.nn.Parameter(-2 * linear.weight.detach())
        compare(model, ids, read(model, ids)[0])
    assert sizes == [64, 64]


@each_device
def test_what_stands_behind_a_text_does_not_spread(device, sizes):
    model = decode_model(device)
    model.model.embed_tokens.weight.data[5] = torch.nan
    long = torch.full((1, 60), 5, device=model.device)
    short = token_ids(1, 40).to(model.device)
    short[short == 5] = 6
    for ids in (short, long, short):
        own, cache = read(model, ids)
    assert sizes == [64]
    compare(model, short, own)
    assert all(x.isfinite().all() for x in cache.layers[0].state.tensors())


@each_device
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, TritonError])
def test_what_cannot_be_recorded_is_read_by_the_layers(error, device, monkeypatch):
    """And is not tried again, until the model changes."""
    model, tries = decode_model(device), []
    ids = token_ids(1, 40).to(model.device)

    def fail(self, *args):
        tries.append(1)
        raise error("no")

    monkeypatch.setattr(RecordedPrompt, "__init__", fail)
    for _ in range(4):
        compare(model, ids, read(model, ids)[0])
    assert len(tries) == 1


@each_device
def test_a_recording_that_fails_on_the_way(device, sizes, monkeypatch):
    """Operations that wait for the device end it; what follows goes on where it was."""
    model = decode_model(device)
    ids, run, calls = token_ids(1, 40).to(model.device), RecordedPrompt._run, []

    def wait(self):
        run(self)
        calls.append(1)
        if self.hidden.is_cuda and len(calls) == 2:
            self.hidden.sum().item()

    monkeypatch.setattr(RecordedPrompt, "_run", wait)
    stream = torch.cuda.current_stream() if device == "cuda" else None
    for _ in range(3):
        compare(model, ids, read(model, ids)[0])
    assert device != "cuda" or torch.cuda.current_stream() == stream
    assert sizes == [64]


@each_device
def test_recordings_take_turns(device, sizes):
    """They share memory, and hold what caches take over."""
    model = decode_model(device)
    texts = [token_ids(1, n, seed=n).to(model.device) for n in (30, 100, 150)]
    for i in (0, 1, 2, 0, 1, 2, 0, 2, 1, 0):
        own, cache = read(model, texts[i])
        expected = compare(model, texts[i], own)
        new = token_ids(1, 20, seed=9).to(model.device)
        compare(model, new, read(model, new, cache=cache)[0], expected)
    assert sizes == [64, 128, 192]


@each_device
def test_memory_that_is_short(device, sizes, monkeypatch):
    """There is none for a recording: the layers read the text."""
    model = decode_model(device)
    ids = token_ids(1, 40).to(model.device)
    monkeypatch.setattr(prompts, "_has_memory", lambda device: False)
    for _ in range(3):
        compare(model, ids, read(model, ids)[0])
    assert not sizes
    monkeypatch.setattr(prompts, "_has_memory", lambda device: True)
    compare(model, ids, read(model, ids)[0])
    assert sizes == [64]


@pytest.mark.gpu
@torch.no_grad()
def test_experts_that_wait_for_the_device(sizes):
    model = decode_model("cuda")
    ids = token_ids(1, 40).cuda()
    model.set_experts_implementation("eager")
    for _ in range(3):
        read(model, ids)
    assert not sizes


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1000, 4000, 4096])
def test_long_texts(num_tokens, sizes):
    model = decode_model("cuda")
    ids = token_ids(1, num_tokens).cuda()
    for _ in range(3):
        own, cache = read(model, ids)
        expected = compare(model, ids, own)
    check(cache.layers[0].state.recurrent, expected.layers[0].state.recurrent, "state")
    assert sizes == [recorded_tokens(num_tokens)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "schemes", [(Scheme(4, 32), Scheme(8, 32)), 2 * (Scheme(8, 32, is_float=True, rows=16),)]
)
def test_packed_weights(schemes, sizes):
    dimensions = {"hidden_size": 96, "intermediate_size": 96, "moe_intermediate_size": 32}
    model = decode_model("cuda", **dimensions, num_shared_experts=2)
    pack_rest(model, every_part(*schemes))
    ids = token_ids(1, 300).cuda()
    for _ in range(3):
        compare(model, ids, read(model, ids)[0])
    assert sizes == [320]


@pytest.mark.gpu
def test_scales_that_were_written_to(sizes, monkeypatch):
    if not has_block_products(architecture(torch.device("cuda"))):
        pytest.skip("this torch or GPU has no products of blocks")
    monkeypatch.setattr(projections, "LIBRARY_SIZE", 128)
    widths = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128}
    model = decode_model("cuda", **widths, num_shared_experts=2)
    blocks = Scheme(8, 128, is_float=True, rows=128, activation_scheme="dynamic")
    pack_rest(model, every_part(blocks, blocks))
    ids = token_ids(1, 2048).cuda()
    for _ in range(3):
        before = read(model, ids)[0]
    scaled = [x for x in model.parameters() if hasattr(x, "block_scales")]
    assert scaled and sizes == [2048]
    for each in scaled:
        each.scale.mul_(0.5)
    own, _ = read(model, ids)
    compare(model, ids, own)
    assert sizes == [2048] and (own - before).abs().max() > 0.1 * before.abs().max()


@pytest.mark.gpu
def test_streams_and_modes(sizes):
    model = decode_model("cuda")
    ids = token_ids(1, 40).cuda()
    with torch.inference_mode():
        for _ in range(2):
            read(model, ids)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        own, _ = read(model, ids)
    torch.cuda.current_stream().wait_stream(other)
    compare(model, ids, own)
    compare(model, ids, read(model, ids)[0])
    assert sizes == [64]
