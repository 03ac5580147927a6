"""The hybrid cache: memory, growth, rollback, rows, forks."""

import copy

import pytest
import torch
from builders import PATTERNS, tiny_config, tiny_model, token_ids
from tolerance import assert_close
from transformers import DynamicCache
from transformers.cache_utils import Cache

import kimi_linear.cache.latents as module
from kimi_linear import KimiLinearBackbone, KimiLinearCache, KimiLinearConfig, presets
from kimi_linear.cache import pieces
from kimi_linear.cache.latents import LatentLayerCache
from kimi_linear.layers.delta_attention import KimiLinearDeltaAttention

pytestmark = pytest.mark.core

FLOAT32 = torch.float32


@pytest.fixture(params=PATTERNS, scope="module")
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def hybrid():
    return tiny_model()


def read(model, cache, ids, **kwargs):
    with torch.no_grad():
        return model(ids, cache=cache, **kwargs).logits


# ------------------------------------------------------------------------------------------- memory
def fixed_bytes(config):
    """KDA states of one row in float32."""
    linear = config.linear_attn_config
    inner, width = linear["num_heads"] * linear["head_dim"], linear["short_conv_kernel_size"]
    layers = config.layer_types.count("linear_attention")
    return layers * 4 * (3 * inner * (width - 1) + inner * linear["head_dim"])


def test_memory_is_fixed_states_and_latents_and_at_most_one_block(hybrid):
    config = hybrid.config
    per_token = (config.kv_lora_rank + config.qk_rope_head_dim) * 4
    for length in (10, 300, 700):
        cache = KimiLinearCache(config, rollback_tokens=0)
        read(hybrid, cache, token_ids(1, length))
        for _ in range(3):
            read(hybrid, cache, token_ids(1, 1))
        memory = cache.cache_memory()
        assert memory["linear_attention"] == fixed_bytes(config)
        assert memory["rollback"] == 0
        above = memory["full_attention"] - (length + 3) * per_token
        assert 0 <= above <= module.BLOCK_TOKENS * per_token


@pytest.mark.parametrize("with_cache", [True, False])
def test_pieces_on_a_cpu_equal_the_whole(hybrid, monkeypatch, with_cache):
    """Logits, states and what `crop` goes back to, cut in the middle of a piece."""
    attend, lengths = KimiLinearDeltaAttention.attend, set()

    def noted(layer, hidden_states, *args, **kwargs):
        lengths.add(hidden_states.shape[1])
        return attend(layer, hidden_states, *args, **kwargs)

    def logits():
        if not with_cache:
            with torch.no_grad():
                return hybrid(token_ids(2, 300), use_cache=False).logits
        cache = KimiLinearCache(hybrid.config, rollback_tokens=30)
        parts = [read(hybrid, cache, token_ids(2, 300))]
        cache.crop(-20)
        return torch.cat([*parts, read(hybrid, cache, token_ids(2, 7, seed=2))], dim=1)

    monkeypatch.setattr(KimiLinearDeltaAttention, "attend", noted)
    expected = logits()
    assert 300 in lengths
    monkeypatch.setattr(pieces, "CPU_ELEMENTS", 1)
    monkeypatch.setattr(pieces, "CPU_TOKENS", 128)
    lengths.clear()
    assert_close(logits(), expected, FLOAT32)
    assert max(lengths) == 128


def test_rollback_costs_what_its_module_says(hybrid):
    config = hybrid.config
    cache = KimiLinearCache(config, rollback_tokens=20)
    for length in (100, 1, 30, 1, 1, 500, 7):
        read(hybrid, cache, token_ids(1, length))
        log = 2 * 20 * config.hidden_size * 4 * config.layer_types.count("linear_attention")
        assert cache.cache_memory()["rollback"] <= fixed_bytes(config) + log


def test_the_48b_shape_takes_1152_bytes_a_token_and_mla_layer_in_16_bits():
    """And three quarters less than with MLA layers only, once the context is long."""
    real = KimiLinearConfig(**presets.PRESETS["48b-a3b"])
    small = dict(hidden_size=64, num_experts=2, num_experts_per_token=1, moe_intermediate_size=8)
    small |= dict(vocab_size=64, intermediate_size=8, num_attention_heads=1)
    small |= dict(pad_token_id=None, bos_token_id=0, eos_token_id=1)
    linear = {**real.linear_attn_config, "num_heads": 2}
    memory, length = {}, 1024
    for name, layers in (("hybrid", linear["full_attn_layers"]), ("all_mla", list(range(1, 28)))):
        kda = [i for i in range(1, 28) if i not in layers]
        kinds = {**linear, "full_attn_layers": layers, "kda_layers": kda}
        config = KimiLinearConfig.from_preset("48b-a3b", **small, linear_attn_config=kinds)
        model = KimiLinearBackbone(config).to(torch.bfloat16).eval()
        cache = KimiLinearCache(config, rollback_tokens=0)
        with torch.no_grad():
            model(token_ids(1, length).clamp(max=63), cache=cache)
        memory[name] = cache.cache_memory()
    num_mla = real.layer_types.count("full_attention")
    assert (num_mla, real.num_hidden_layers) == (7, 27)
    assert memory["hybrid"]["full_attention"] == num_mla * length * 1152
    assert memory["all_mla"]["full_attention"] == 27 * length * 1152
    # the states have 2 of the 32 heads here
    states = 16 * memory["hybrid"]["linear_attention"]
    assert states == 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2)
    context = 1 << 20
    ratio = (num_mla * context * 1152 + states) / (27 * context * 1152)
    assert 0.25 < ratio < 0.262


def test_latents_are_not_copied_to_append(hybrid):
    cache = KimiLinearCache(hybrid.config)
    read(hybrid, cache, token_ids(1, 5))
    latents = next(layer for layer in cache.layers if isinstance(layer, LatentLayerCache))
    states = cache.layers[0]
    pointers = latents.tail.data_ptr(), states.state.recurrent.data_ptr()
    for _ in range(4):
        read(hybrid, cache, token_ids(1, 1))
    assert (latents.tail.data_ptr(), states.state.recurrent.data_ptr()) == pointers


def test_reserved_room_is_made_once(hybrid):
    cache = KimiLinearCache(hybrid.config, reserve_tokens=1000)
    read(hybrid, cache, token_ids(1, 5))
    tail = cache.layers[3].tail
    assert tail.shape[1] == 1024
    read(hybrid, cache, token_ids(1, 900))
    assert cache.layers[3].tail is tail
    ids = token_ids(1, 1100, seed=3)
    cache.reset()
    read(hybrid, cache, ids[:, :900])
    with torch.no_grad():
        expected = hybrid(ids, use_cache=False).logits[:, 900:]
    assert_close(read(hybrid, cache, ids[:, 900:]), expected, FLOAT32)


def test_large_buffers_are_closed_instead_of_copied(hybrid, monkeypatch):
    monkeypatch.setattr(module, "SEGMENT_TOKENS", 512)
    ids = token_ids(2, 1700)
    with torch.no_grad():
        expected = hybrid(ids, use_cache=False).logits
    cache, parts = KimiLinearCache(hybrid.config), []
    for part in ids.split((500, 100, 600, 1, 499), dim=1):
        parts.append(read(hybrid, cache, part))
    latents = cache.layers[3]
    assert len(latents.full) >= 2 and min(x.shape[1] for x in latents.full) >= 512
    assert sum(x.shape[1] for x in latents.segments()) == 1700
    used = 1700 - latents.num_full
    assert latents.tail.shape[1] - used <= module.BLOCK_TOKENS
    assert_close(torch.cat(parts, dim=1), expected, FLOAT32)


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_latents_give_the_same(hybrid, offload):
    ids = token_ids(2, 40)
    cache = KimiLinearCache(hybrid.config, offload=offload)
    with torch.no_grad():
        expected = hybrid(ids, use_cache=False).logits
    parts = [read(hybrid, cache, part) for part in ids.split((17, 1, 22), dim=1)]
    assert_close(torch.cat(parts, dim=1), expected, FLOAT32)


# ----------------------------------------------------------------------------------------- rollback
@pytest.mark.parametrize("rollback_tokens", [5, 64])
@pytest.mark.parametrize("chunks", [(30,), (25, 5), (26, 1, 1, 1, 1), (3, 1, 26), (12, 9, 9)])
@pytest.mark.parametrize("removed", [1, 4, 5])
def test_crop_then_other_tokens(model, chunks, removed, rollback_tokens):
    """Read 30 tokens, take some back, go on otherwise: the same as never having read them."""
    ids, other = token_ids(2, 30), token_ids(2, 12, seed=7)
    cache = KimiLinearCache(model.config, rollback_tokens=rollback_tokens)
    for part in ids.split(chunks, dim=1):
        read(model, cache, part)
    cache.crop(-removed)
    assert cache.get_seq_length() == 30 - removed
    parts = [read(model, cache, part) for part in other.split((1, 8, 1, 1, 1), dim=1)]
    text = torch.cat([ids[:, : 30 - removed], other], dim=1)
    with torch.no_grad():
        expected = model(text, use_cache=False).logits[:, 30 - removed :]
    assert_close(torch.cat(parts, dim=1), expected, FLOAT32)


def test_crops_one_after_the_other(model):
    """Read a few, take some of them back, many times: as speculative decoding does."""
    generator = torch.Generator().manual_seed(0)
    cache, text = KimiLinearCache(model.config, rollback_tokens=6), token_ids(1, 9)
    read(model, cache, text)
    for _ in range(40):
        count, removed = torch.randint(0, 6, (2,), generator=generator).tolist()
        count += 1
        more = torch.randint(0, 94, (1, count), generator=generator)
        out = read(model, cache, more)
        text = torch.cat([text, more], dim=1)
        with torch.no_grad():
            expected = model(text, use_cache=False).logits[:, -count:]
        assert_close(out, expected, FLOAT32)
        removed = min(removed, count)
        cache.crop(-removed)
        text = text[:, : text.shape[1] - removed]


def test_crop_everything_of_a_short_text(hybrid):
    cache = KimiLinearCache(hybrid.config)
    read(hybrid, cache, token_ids(1, 20))
    cache.crop(-20)
    ids = token_ids(1, 9, seed=5)
    with torch.no_grad():
        expected = hybrid(ids, use_cache=False).logits
    assert_close(read(hybrid, cache, ids), expected, FLOAT32)


def test_a_positive_number_is_what_stays_and_zero_changes_nothing(hybrid):
    cache = KimiLinearCache(hybrid.config)
    read(hybrid, cache, token_ids(1, 20))
    cache.crop(0)
    cache.crop(25)
    assert cache.get_seq_length() == 20
    cache.crop(17)
    assert cache.get_seq_length() == 17
    cache.crop(torch.tensor(-2))  # as Transformers 5.17 does
    assert cache.get_seq_length() == 15 and type(cache.layers[0].num_tokens) is int


def test_a_crop_beyond_what_was_kept_is_an_error_and_changes_nothing():
    model = tiny_model("mla_first")  # its latents could be cropped, before the states refuse
    ids = token_ids(1, 60)
    cache = KimiLinearCache(model.config, rollback_tokens=8)
    read(model, cache, ids[:, :50])
    with pytest.raises(ValueError, match="rollback_tokens=8"):
        cache.crop(-30)
    with pytest.raises(ValueError, match="holds 50 tokens"):
        cache.crop(-51)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits[:, 50:]
    assert_close(read(model, cache, ids[:, 50:]), expected, FLOAT32)
    none = KimiLinearCache(model.config, rollback_tokens=0)
    read(model, none, ids)
    with pytest.raises(ValueError, match="rollback_tokens=0"):
        none.crop(-1)
    with pytest.raises(ValueError, match="rollback_tokens=-1"):
        KimiLinearCache(model.config, rollback_tokens=-1)


def test_all_that_was_promised_can_be_taken_back(hybrid):
    """`rollback_tokens` at any time, whatever the calls before were."""
    generator = torch.Generator().manual_seed(0)
    cache = KimiLinearCache(hybrid.config, rollback_tokens=7)
    for _ in range(60):
        count = int(torch.randint(1, 20, (1,), generator=generator))
        read(hybrid, cache, token_ids(1, count if count < 15 else 1))
        kept = cache.layers[0].rollback.num_logged
        assert min(7, cache.get_seq_length()) <= kept <= 14


def test_past_recording_can_begin_at_any_time(hybrid):
    ids = token_ids(1, 60)
    cache = KimiLinearCache(hybrid.config, rollback_tokens=0)
    read(hybrid, cache, ids[:, :40])
    assert not cache.is_croppable
    cache.activate_past_recording()
    assert cache.is_croppable
    for t in range(40, 50):
        read(hybrid, cache, ids[:, t : t + 1])
    cache.crop(-10)
    with pytest.raises(ValueError, match="at least 40 must stay"):
        cache.crop(-1)
    with torch.no_grad():
        expected = hybrid(ids, use_cache=False).logits[:, 40:]
    assert_close(read(hybrid, cache, ids[:, 40:]), expected, FLOAT32)


def test_rollback_with_padding(model):
    """Left, right and interior padding; what is taken back includes padded columns."""
    ids = token_ids(3, 30)
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[0, :11], mask[1, 20:26], mask[2, 25:] = 0, 0, 0
    cache = KimiLinearCache(model.config, rollback_tokens=10)
    with torch.no_grad():
        for a, b in ((0, 22), (22, 30)):
            model(ids[:, a:b], attention_mask=mask[:, :b], cache=cache)
        cache.crop(-7)
        more = token_ids(3, 5, seed=9)
        mask = torch.cat([mask[:, :23], torch.ones(3, 5, dtype=torch.long)], dim=1)
        out = model(more, attention_mask=mask, cache=cache).logits
        text = torch.cat([ids[:, :23], more], dim=1)
        for row in range(3):
            alone = text[row][mask[row].bool()]
            expected = model(alone[None], use_cache=False).logits[0, -5:]
            assert_close(out[row], expected, FLOAT32, f"row {row}")


def test_gradients_flow_through_a_rollback(hybrid):
    ids, more = token_ids(1, 12), token_ids(1, 6, seed=4)
    grads = []
    for crops in (False, True):
        embeds = hybrid.get_input_embeddings()(ids).detach().requires_grad_()
        cache = KimiLinearCache(hybrid.config)
        hybrid(inputs_embeds=embeds, cache=cache)
        if crops:
            hybrid(token_ids(1, 3, seed=8), cache=cache)
            cache.crop(-3)
        hybrid(more, cache=cache).logits[:, -1].square().sum().backward()
        grads.append(embeds.grad)
    hybrid.zero_grad()
    assert_close(grads[1], grads[0], FLOAT32)


# ------------------------------------------------------------------------------------- rows, copies
ROWS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("operation", ROWS)
def test_row_operations(model, operation, stale):
    """Also between a crop and the call that replays."""
    change, rows = ROWS[operation]
    ids, more = token_ids(3, 20), token_ids(3, 4, seed=8)[rows]
    cache = KimiLinearCache(model.config)
    read(model, cache, ids)
    if stale:
        cache.crop(-3)
    change(cache)
    kept = ids[rows][:, : 17 if stale else 20]
    with torch.no_grad():
        expected = model(torch.cat([kept, more], dim=1), use_cache=False).logits[:, -4:]
    assert_close(read(model, cache, more), expected, FLOAT32)


def test_rows_go_on_from_one_prefix_without_copying_it(model):
    ids, more = token_ids(1, 300), token_ids(4, 6, seed=8)
    cache = KimiLinearCache(model.config, rollback_tokens=8)
    read(model, cache, ids)
    before = cache.cache_memory()["full_attention"]
    cache.batch_repeat_interleave(4)
    assert cache.cache_memory()["full_attention"] <= before
    text = torch.cat([ids.expand(4, -1), more], dim=1)
    with torch.no_grad():
        expected = model(text, use_cache=False).logits
    assert_close(read(model, cache, more[:, :5]), expected[:, 300:305], FLOAT32)
    cache.crop(-7)  # into the prefix
    parts = read(model, cache, text[:, 298:])
    assert_close(parts, expected[:, 298:], FLOAT32)
    cache.batch_select_indices(torch.tensor([3, 1]))
    last = token_ids(2, 1, seed=5)
    with torch.no_grad():
        expected = model(torch.cat([text[[3, 1]], last], dim=1), use_cache=False).logits[:, -1:]
    assert_close(read(model, cache, last), expected, FLOAT32)


def test_forks_share_the_prefix_and_go_their_own_ways(model):
    ids = token_ids(2, 300)
    parent = KimiLinearCache(model.config)
    read(model, parent, ids)
    forks = [parent.fork() for _ in range(2)]
    shared = [
        (a.segments()[0].data_ptr(), b.segments()[0].data_ptr())
        for a, b in zip(parent.layers, forks[0].layers, strict=True)
        if isinstance(a, LatentLayerCache)
    ]
    assert all(a == b for a, b in shared)
    forks.append(forks[0].fork())
    caches = [parent, *forks]
    texts = [ids] * len(caches)
    for step, crop in ((4, 0), (1, 8), (2, 0), (2, 0)):  # some go back into the prefix
        for i, cache in enumerate(caches):
            removed = crop if i % 2 else 0
            more = token_ids(2, step, seed=10 * step + i)
            out = read(model, cache, more)
            texts[i] = torch.cat([texts[i], more], dim=1)
            with torch.no_grad():
                expected = model(texts[i], use_cache=False).logits[:, -step:]
            assert_close(out, expected, FLOAT32, f"cache {i}")
            cache.crop(-removed)
            texts[i] = texts[i][:, : texts[i].shape[1] - removed]


@pytest.mark.parametrize("how", [KimiLinearCache.copy, copy.deepcopy])
def test_copies_are_independent(hybrid, how):
    ids, more = token_ids(1, 30), token_ids(1, 5, seed=2)
    cache = KimiLinearCache(hybrid.config)
    read(hybrid, cache, ids)
    other = how(cache)
    read(hybrid, cache, token_ids(1, 9, seed=3))
    with torch.no_grad():
        expected = hybrid(torch.cat([ids, more], dim=1), use_cache=False).logits[:, 30:]
    assert_close(read(hybrid, other, more), expected, FLOAT32)


# ----------------------------------------------------------------------------------------- refusals
def test_a_mask_that_contradicts_the_cache_is_refused(hybrid):
    ids, mask = token_ids(1, 10), torch.ones(1, 10, dtype=torch.long)
    cache = KimiLinearCache(hybrid.config)
    read(hybrid, cache, ids[:, :6])
    late = mask.clone()
    late[0, 2] = 0
    with pytest.raises(ValueError, match="zeros among the cached tokens"):
        read(hybrid, cache, ids[:, 6:], attention_mask=late)
    cache.reset()
    read(hybrid, cache, ids[:, :6], attention_mask=late[:, :6])
    with pytest.raises(ValueError, match="attention_mask=None"):
        read(hybrid, cache, ids[:, 6:])


def test_a_cache_that_an_error_left_half_written_is_refused(hybrid):
    cache = KimiLinearCache(hybrid.config)
    read(hybrid, cache, token_ids(1, 6))
    cache.layers[1].num_tokens += 1
    with pytest.raises(ValueError, match="of 6 and of 7 tokens"):
        read(hybrid, cache, token_ids(1, 1))


@pytest.mark.parametrize("num_cached", [0, 6])
def test_a_cache_of_other_layers_is_refused(model, num_cached, tmp_path):
    """KDA layers read one of MLA layers only as if it held nothing."""
    ids = token_ids(2, 9)
    for pattern in PATTERNS:
        other = tiny_model(pattern)
        kinds = zip(other.config.layer_types, model.config.layer_types, strict=True)
        first = next((i for i, (kind, needed) in enumerate(kinds) if kind != needed), None)
        if first is None:
            continue
        cache = KimiLinearCache(other.config)
        if num_cached:
            read(other, cache, ids[:, :num_cached])
        for call in (
            lambda cache=cache: read(model, cache, ids[:, num_cached:]),
            lambda cache=cache: read(model, cache, ids[:, num_cached : num_cached + 1]),
            lambda cache=cache: model.generate(ids, cache=cache, max_new_tokens=2),
            lambda cache=cache: model.save_session(tmp_path / "s", cache),
        ):
            with pytest.raises(ValueError, match=rf"cache\.layers\[{first}\] is one of "):
                call()
        assert cache.get_seq_length() == num_cached
    short = KimiLinearCache(tiny_config("all_kda", num_hidden_layers=3))
    with pytest.raises(ValueError, match="cache has 3 layers, .* num_hidden_layers=4"):
        model.save_session(tmp_path / "s", short)
    with pytest.raises(ValueError, match="cache has 3 layers, .* num_hidden_layers=4"):
        model.generate(ids, cache=short, max_new_tokens=2)


@pytest.mark.parametrize("pattern", ["hybrid", "mla_first"])
@torch.no_grad()
def test_dynamic_cache_is_cropped_in_all_layers_or_in_none(pattern):
    """MLA layers could go back further than KDA layers, and may come first."""
    model, cache = tiny_model(pattern), DynamicCache()
    model(token_ids(1, 300), cache=cache)
    assert isinstance(cache, DynamicCache)
    with pytest.raises(ValueError, match=r"crop\(-250\) would leave 50 of 300 tokens"):
        cache.crop(-250)
    assert {layer.num_tokens for layer in cache.layers} == {300}
    cache.crop(-2)
    expected = model(token_ids(1, 300)).logits[:, -2:]
    assert_close(model(token_ids(1, 300)[:, -2:], cache=cache).logits, expected, torch.float32)


def test_an_offloading_dynamic_cache_is_taken_over(hybrid):
    cache = DynamicCache(config=tiny_config(), offloading=True)
    ids = token_ids(1, 12)
    with torch.no_grad():
        expected = hybrid(ids, use_cache=False).logits[:, 7:]
    read(hybrid, cache, ids[:, :7])
    assert_close(read(hybrid, cache, ids[:, 7:]), expected, FLOAT32)
    assert cache.layers[3].offload_latents


def test_a_cache_made_by_hand_of_our_layers():
    model, ids = tiny_model(), token_ids(2, 9)
    cache = Cache(layers=KimiLinearCache(model.config).layers)
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :5], cache=cache)
        assert_close(model(ids[:, 5:], cache=cache).logits, expected[:, 5:], torch.float32)
