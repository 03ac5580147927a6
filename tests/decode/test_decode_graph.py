"""Decoding by the recorded step beside decoding layer by layer: logits, caches, `generate()`."""

import gc
import logging
import weakref

import pytest
import torch
from builders import TWO_LAYERS, token_ids
from decode_models import DEVICES, INTERPRETED, decode_model, small_grids  # noqa: F401
from tolerance import assert_close, assert_kernel_close

from kimi_linear import KimiLinearCache
from kimi_linear.decode import graph as graph_module
from kimi_linear.decode import many_rows, obstacles, recording
from kimi_linear.ops.runtime import TritonError

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted, pytest.mark.usefixtures("small_grids")]
each_device = pytest.mark.parametrize("device", DEVICES)
GREEDY = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=96)


def check(actual, expected, name=""):
    if actual.is_cuda:
        assert_kernel_close(actual, expected, torch.bfloat16, name)
    else:
        assert_close(actual, expected, torch.float32, name)


def call(model, backend, ids, cache, **kwargs):
    model.decode_backend = backend
    return model(ids.to(model.device), cache=cache, **kwargs).logits


def both(model, cache, ids, steps=3, mask=None):
    """Decode the same tokens behind two copies of a cache, by either backend, and compare."""
    caches = {"eager": cache, "graph": cache.copy()}
    for i in range(steps):
        token = token_ids(ids.shape[0], 1, seed=10 + i)
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = {
            backend: call(model, backend, token, cache, attention_mask=mask)
            for backend, cache in caches.items()
        }
        check(logits["graph"], logits["eager"], f"step {i}")
    return caches["eager"], caches["graph"]


@each_device
@pytest.mark.parametrize("num_rows", [1, 2, 5])
@torch.no_grad()
def test_steps_equal_the_layers(num_rows, device):
    model = decode_model(device)
    cache, ids = KimiLinearCache(model.config), token_ids(num_rows, 7)
    call(model, "eager", ids, cache)
    eager, graph = both(model, cache, ids)
    assert graph.get_seq_length() == eager.get_seq_length() == 10
    for own, other in zip(graph.layers, eager.layers, strict=True):
        assert own.num_tokens == other.num_tokens
        if own.kind == "linear_attention":
            assert own.rollback.num_logged == other.rollback.num_logged


@each_device
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("full_layers", [[1, 2], []], ids=["all_mla", "all_kda"])
@torch.no_grad()
def test_models_of_one_kind_of_attention(num_rows, full_layers, device):
    linear = {**TWO_LAYERS["linear_attn_config"], "full_attn_layers": full_layers}
    model = decode_model(device, linear_attn_config=linear)
    cache, ids = KimiLinearCache(model.config), token_ids(num_rows, 7)
    call(model, "eager", ids, cache)
    both(model, cache, ids)


@each_device
@torch.no_grad()
def test_many_rows_equal_the_layers(device, monkeypatch):
    """As beyond `SOME_ROWS`: each weight by a product of its own."""
    monkeypatch.setattr(many_rows, "SOME_ROWS", 4)
    model = decode_model(device)
    cache, ids = KimiLinearCache(model.config), token_ids(6, 7)
    call(model, "eager", ids, cache)
    both(model, cache, ids, steps=2)


@each_device
@torch.no_grad()
def test_layers_and_steps_take_turns(device):
    """One cache, written by both backends in turn and by calls of several tokens."""
    model = decode_model(device)
    mixed, plain, ids = (KimiLinearCache(model.config) for _ in range(2)), None, token_ids(2, 30)
    mixed, plain = mixed
    for i, (start, stop) in enumerate(
        [(0, 5), (5, 6), (6, 7), (7, 8), (8, 12), (12, 13), (13, 14)]
    ):
        a = call(model, "graph" if i % 3 == 1 else "eager", ids[:, start:stop], mixed)
        b = call(model, "eager", ids[:, start:stop], plain)
        check(a, b, f"tokens {start} to {stop}")


@each_device
@torch.no_grad()
def test_padding_is_not_attended_to(device):
    model = decode_model(device)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, :4], mask[2, 3:6] = 0, 0
    cache, ids = KimiLinearCache(model.config), token_ids(3, 9)
    call(model, "eager", ids, cache, attention_mask=mask)
    both(model, cache, ids, mask=mask)


@each_device
@torch.no_grad()
def test_padding_in_the_new_column_runs_layer_by_layer(device):
    model = decode_model(device)
    cache, ids = KimiLinearCache(model.config), token_ids(2, 4)
    call(model, "eager", ids, cache)
    other, mask = cache.copy(), torch.ones(2, 5, dtype=torch.int64)
    mask[1, -1] = 0
    a = call(model, "graph", token_ids(2, 1), cache, attention_mask=mask)
    check(a, call(model, "eager", token_ids(2, 1), other, attention_mask=mask))


@each_device
@torch.no_grad()
def test_prefix_shared_by_forks_and_rows(device):
    """Latents that lie in two places, the first of them in one row for all."""
    model = decode_model(device)
    cache, ids = KimiLinearCache(model.config), token_ids(1, 20)
    call(model, "eager", ids, cache)
    cache.batch_repeat_interleave(3)
    fork = cache.fork()
    assert model.decode_backend == "eager" and fork.layers[1].full[0].shape[0] == 1
    both(model, fork, ids.expand(3, -1), steps=2)
    both(model, cache, ids.expand(3, -1), steps=1)


@each_device
@torch.no_grad()
def test_long_texts_grow_beyond_a_block(device, monkeypatch):
    """Buffers that move while a recording is in use, and segments that are joined."""
    monkeypatch.setattr("kimi_linear.cache.latents.BLOCK_TOKENS", 4)
    monkeypatch.setattr("kimi_linear.cache.latents.SEGMENT_TOKENS", 8)
    model = decode_model(device)
    cache, ids = KimiLinearCache(model.config, rollback_tokens=0), token_ids(1, 11)
    for part in ids.split(3, dim=1):
        call(model, "eager", part, cache)
    both(model, cache, ids, steps=6)


@each_device
@torch.no_grad()
def test_crop_takes_back_what_a_step_has_written(device):
    model = decode_model(device)
    cache, ids = KimiLinearCache(model.config, rollback_tokens=4), token_ids(2, 6)
    call(model, "eager", ids, cache)
    eager, graph = both(model, cache, ids, steps=3)
    for each in (eager, graph):
        each.crop(-2)
    both(model, graph, ids, steps=2)
    both(model, eager, ids, steps=2)
    check(graph.layers[0].state.recurrent, eager.layers[0].state.recurrent)


@each_device
@pytest.mark.parametrize("num_read", [1, 6])
@torch.no_grad()
def test_anchors_move_under_steps(num_read, device, monkeypatch):
    """Steps far beyond what the log holds, and back: no step runs layer by layer."""
    model, steps, run = decode_model(device), [], recording.Recording.run
    monkeypatch.setattr(recording.Recording, "run", lambda *args: steps.append(0) or run(*args))
    caches, ids = [KimiLinearCache(model.config, rollback_tokens=2) for _ in "ab"], token_ids(1, 20)
    for cache in caches:
        call(model, "eager", ids[:, :num_read], cache)
    eager, graph = caches
    _decode(model, "graph", ids[:, num_read : num_read + 2], graph)  # records
    _decode(model, "eager", ids[:, num_read : num_read + 2], eager)
    for i in range(num_read + 2, num_read + 9):
        expected = call(model, "eager", ids[:, i : i + 1], eager)
        fork = graph.fork() if graph.layers[0].rollback.num_logged >= 2 else None
        steps.clear()
        check(call(model, "graph", ids[:, i : i + 1], graph), expected, f"token {i}")
        assert len(steps) == 1 and min(i, 2) <= graph.layers[0].rollback.num_logged <= 4
        if fork is not None:  # both tokens back, and the same two again
            fork.crop(-2)
            call(model, "eager", ids[:, i - 2 : i], fork)
            check(call(model, "graph", ids[:, i : i + 1], fork), expected, f"back before {i}")


@each_device
@torch.no_grad()
def test_anchor_to_come_is_dropped_with_its_tokens(device):
    model = decode_model(device)
    cache, ids = KimiLinearCache(model.config, rollback_tokens=3), token_ids(1, 20)
    call(model, "eager", ids[:, :1], cache)
    _decode(model, "graph", ids[:, 1:6], cache)
    kda = cache.layers[0]
    assert (
        kda.rollback.next_anchor_tokens == 3
        and cache.fork().layers[0].rollback.next_anchor_tokens == 3
    )
    rows = cache.copy()
    rows.batch_repeat_interleave(2)
    assert rows.layers[0].rollback.next_anchor.recurrent.shape[0] == 2
    cache.crop(-2)  # four tokens stay
    assert kda.rollback.next_anchor_tokens == 3
    cache.crop(-2)
    assert kda.rollback.next_anchor_tokens is None and kda.rollback.next_anchor.recurrent is None
    plain = KimiLinearCache(model.config)
    expected = call(model, "eager", ids[:, :3], plain)
    check(call(model, "eager", ids[:, 2:3], cache)[:, -1], expected[:, -1])


def _decode(model, backend, ids, cache):
    for token in ids.split(1, dim=1):
        call(model, backend, token, cache)


@each_device
@torch.no_grad()
def test_caches_take_turns(device):
    """Two texts decoded in turn by one recording."""
    model = decode_model(device)
    texts = [token_ids(1, 5, seed=1), token_ids(1, 8, seed=2)]
    caches = [KimiLinearCache(model.config) for _ in texts]
    plain = [KimiLinearCache(model.config) for _ in texts]
    for ids, own, other in zip(texts, caches, plain, strict=True):
        call(model, "eager", ids, own)
        call(model, "eager", ids, other)
    for i in range(4):
        token = token_ids(1, 1, seed=20 + i)
        a = call(model, "graph", token, caches[i % 2])
        check(a, call(model, "eager", token, plain[i % 2]))


@each_device
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 2},
        {"prefill_chunk_size": 3},
    ],
    ids=lambda how: ",".join(how) or "greedy",
)
def test_generate_gives_the_same_ids(how, device):
    model = decode_model(device)
    # far from ties, so that rounding does not choose the token
    model.lm_head.weight.data.mul_(40)
    ids, results = token_ids(1, 7).to(model.device), []
    for backend in ("eager", "graph"):
        model.decode_backend = backend
        torch.manual_seed(3)
        out = model.generate(ids, **{**GREEDY, **how})
        results.append(out.sequences if "return_dict_in_generate" in how else out)
    assert torch.equal(*results)


@each_device
def test_generate_takes_padded_prompts(device):
    model = decode_model(device)
    model.lm_head.weight.data.mul_(40)
    ids = token_ids(3, 8).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    results = []
    for backend in ("eager", "graph"):
        model.decode_backend = backend
        results.append(model.generate(ids, attention_mask=mask, **GREEDY))
    assert torch.equal(*results)


def scale_in_place(model, weight):
    weight.data.mul_(-2)


def load(model, weight):
    model.load_weights([("model.layers.1.self_attn.o_proj.weight", weight.cpu() * -2)])


def replace_data(model, weight):
    weight.data = weight.data * -2


def replace_parameter(model, weight):
    model.model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(weight * -2)


def replace_module(model, weight):
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False, device=weight.device)
    linear.weight.data = weight * -2
    model.set_submodule("model.layers.1.self_attn.o_proj", linear)


def move(model, weight):
    dtype = weight.dtype
    model.to(torch.float64).to(dtype)
    weight.data.mul_(-2)


def change_constant(model, weight):
    model.config.routed_scaling_factor *= 0.5


@each_device
@pytest.mark.parametrize(
    "change",
    [scale_in_place, load, replace_data, replace_parameter, replace_module, move, change_constant],
)
@torch.no_grad()
def test_changes_in_the_middle_of_a_text_are_seen(change, device):
    model = decode_model(device)
    cache, ids = KimiLinearCache(model.config), token_ids(1, 5)
    call(model, "eager", ids, cache)
    _, cache = both(model, cache, ids, steps=1)
    change(model, model.model.layers[1].self_attn.o_proj.weight)
    token, plain = token_ids(1, 1, seed=3), cache.copy()
    check(call(model, "graph", token, cache), call(model, "eager", token, plain))


@each_device
@torch.no_grad()
def test_caches_that_take_turns_see_new_weights(device, monkeypatch):
    """Each keeps its table of addresses; the model is walked through once, and when it changes."""
    model, walks = decode_model(device), []
    look = graph_module.model_obstacle
    monkeypatch.setattr(
        graph_module, "model_obstacle", lambda model: walks.append(0) or look(model)
    )
    caches = [KimiLinearCache(model.config) for _ in range(2)]
    for i, cache in enumerate(caches):
        call(model, "eager", token_ids(1, 5 + i), cache)
    plain = [cache.copy() for cache in caches]
    for i in range(6):
        if i == 4:
            assert len(walks) == 1
            replace_data(model, model.model.layers[1].self_attn.o_proj.weight)
        token = token_ids(1, 1, seed=20 + i)
        a = call(model, "graph", token, caches[i % 2])
        check(a, call(model, "eager", token, plain[i % 2]))
    assert len(walks) == 2


@each_device
@torch.no_grad()
def test_obstacles_in_the_middle_of_a_text_are_seen(device):
    """An adapter in a linear's place, an early exit; and they go again."""
    model = decode_model(device)
    cache = KimiLinearCache(model.config)
    call(model, "eager", token_ids(1, 5), cache)
    _, cache = both(model, cache, token_ids(1, 5), steps=1)
    attention, token = model.model.layers[1].self_attn, token_ids(1, 1)
    linear = attention.o_proj
    attention.o_proj = torch.nn.Sequential(linear)
    with pytest.raises(ValueError, match="o_proj is a Sequential"):
        call(model, "graph", token, cache)
    attention.o_proj = linear
    handle = linear.register_forward_pre_hook(lambda *args: None)
    with pytest.raises(ValueError, match="a module has hooks"):
        call(model, "graph", token, cache)
    handle.remove()
    both(model, cache, token, steps=1)


@each_device
@torch.no_grad()
def test_models_that_have_decoded_are_freed(device):
    model = decode_model(device)
    cache = KimiLinearCache(model.config)
    call(model, "eager", token_ids(1, 5), cache)
    call(model, "graph", token_ids(1, 1), cache)
    found = weakref.ref(model)
    del model
    gc.collect()
    assert found() is None


@each_device
def test_recordings_serve_inference_mode_and_no_grad(device):
    """Tensors made in inference mode must not be written to outside of it."""
    model = decode_model(device)
    with torch.inference_mode():
        cache = KimiLinearCache(model.config)
        call(model, "eager", token_ids(1, 5), cache)
        both(model, cache, token_ids(1, 5), steps=1)
    with torch.no_grad():
        both(model, cache, token_ids(1, 5), steps=1)
    with torch.inference_mode():
        both(model, cache, token_ids(1, 5), steps=1)


@each_device
@torch.no_grad()
def test_kernels_that_cannot_be_built_leave_the_layers(device, monkeypatch):
    model = decode_model(device)
    cache = KimiLinearCache(model.config)
    call(model, "eager", token_ids(1, 5), cache)

    def fail(self, *args):
        raise TritonError("out of resources")

    monkeypatch.setattr(recording.FewRowsStep, "__init__", fail)
    with pytest.raises(TritonError):
        call(model, "graph", token_ids(1, 1), cache.copy())
    a = call(model, "auto", token_ids(1, 1), cache.copy())
    assert torch.equal(a, call(model, "eager", token_ids(1, 1), cache.copy()))
    with pytest.raises(ValueError, match=r"its kernels cannot be built \(out of resources\)"):
        call(model, "graph", token_ids(1, 1), cache)


@each_device
@torch.no_grad()
def test_recordings_know_the_config(device):
    model = decode_model(device)
    for scaling in (2.5, 0.5):
        model.config.routed_scaling_factor = scaling
        cache = KimiLinearCache(model.config)
        call(model, "eager", token_ids(1, 5), cache)
        both(model, cache, token_ids(1, 5), steps=1)


@each_device
@torch.no_grad()
def test_hooks_are_called(device):
    model = decode_model(device)
    cache, called = KimiLinearCache(model.config), []
    call(model, "eager", token_ids(1, 5), cache)
    both(model, cache, token_ids(1, 5), steps=1)
    model.model.layers[0].mlp.register_forward_hook(lambda *args: called.append(1))
    call(model, "auto", token_ids(1, 1), cache)
    assert called == [1]
    with pytest.raises(ValueError, match="decode_backend='graph' is not possible here: a module"):
        call(model, "graph", token_ids(1, 1), cache)


@each_device
def test_gradients_run_layer_by_layer(device):
    model = decode_model(device)
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        call(model, "eager", token_ids(1, 5), cache)
    assert call(model, "graph", token_ids(1, 1), cache).requires_grad


@each_device
@torch.no_grad()
def test_autocast_to_the_dtype_of_the_weights(device, monkeypatch):
    """Trainers that compute in bfloat16 generate under it; to another dtype it is an obstacle.
    (Triton's interpreter computes other numbers in bfloat16, with and without.)"""
    monkeypatch.setattr(obstacles, "DTYPES", (torch.bfloat16,))
    model = decode_model(device).to(torch.bfloat16)
    cache = KimiLinearCache(model.config)
    call(model, "eager", token_ids(1, 5), cache)
    token, plain = token_ids(1, 1), cache.copy()
    with torch.autocast(device, torch.bfloat16):
        logits = call(model, "graph", token, cache)
    assert torch.equal(logits, call(model, "graph", token, plain))
    with (
        torch.autocast(device, torch.float16),
        pytest.raises(ValueError, match="autocast is on"),
    ):
        call(model, "graph", token, cache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_lora_rank": 20}, "kv_lora_rank=20 is no power of two of at least 16"),
        ({"v_head_dim": 8}, "v_head_dim=8 is no power of two"),
        ({"intermediate_size": 20}, "intermediate_size=20 is no multiple of 8"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not 'silu'"),
        ({"q_lora_rank": 16}, "q_lora_rank=16 is not None"),
        ({"num_expert_group": 2}, "num_expert_group=2 is not topk_group=1"),
    ],
)
def test_sizes_that_the_kernels_do_not_take(fields, message):
    reason = obstacles.config_obstacle(decode_model("cpu", **fields).config)
    assert reason.startswith(message)


def test_chips_that_the_kernels_are_not_made_for(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, message in [
        ((7, 5), "compute capability (7, 5) is below (8, 0)"),
        ((9, 0), ""),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert message in obstacles.chip_obstacle(device)
        assert bool(message) == bool(obstacles.chip_obstacle(device))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert obstacles.chip_obstacle(device) == "this torch is not made for CUDA"


def test_weights_that_the_kernels_do_not_take(monkeypatch):
    monkeypatch.setattr(obstacles, "DTYPES", (torch.float32,))
    model = decode_model("cpu")
    assert obstacles.weight_obstacle(model) == ""
    linear = model.model.layers[1].self_attn.o_proj
    weight = linear.weight
    linear.weight = torch.nn.Parameter(weight.t().contiguous().t())
    assert "layers.1.self_attn.o_proj.weight is not contiguous" in obstacles.weight_obstacle(model)
    linear.weight = torch.nn.Parameter(weight.double())
    assert "is torch.float64, others are torch.float32" in obstacles.weight_obstacle(model)
    linear.weight = weight
    linear.register_parameter("bias", torch.nn.Parameter(torch.zeros(weight.shape[0])))
    assert "o_proj has a bias" in obstacles.weight_obstacle(model)
    linear.bias = None
    model.model.layers[1].self_attn.o_proj = torch.nn.Sequential(linear)
    assert "o_proj is a Sequential" in obstacles.weight_obstacle(model)
    model = decode_model("cpu")
    model.model.layers[1].block_sparse_moe.experts.act_fn = torch.nn.GELU()
    assert "experts.act_fn is a GELU" in obstacles.weight_obstacle(model)


@torch.no_grad()
def test_backends_are_checked():
    model = decode_model("cpu")
    cache = KimiLinearCache(model.config)
    call(model, "auto", token_ids(1, 4), cache)
    with pytest.raises(ValueError, match="decode_backend='fast' is not allowed: it must be one"):
        call(model, "fast", token_ids(1, 1), cache)


@pytest.mark.skipif(INTERPRETED, reason="the kernels run here")
@torch.no_grad()
def test_a_cpu_runs_layer_by_layer(caplog):
    model = decode_model("cpu")
    cache = KimiLinearCache(model.config)
    call(model, "auto", token_ids(1, 4), cache)
    with caplog.at_level(logging.WARNING):
        call(model, "auto", token_ids(1, 1), cache)
    assert not caplog.records
    with pytest.raises(
        ValueError, match="not possible here: (triton is not|the model is on 'cpu')"
    ):
        call(model, "graph", token_ids(1, 1), cache)
