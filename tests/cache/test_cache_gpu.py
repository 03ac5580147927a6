"""The cache on a GPU: both forms of latent attention, long calls, rollback, offloading, memory."""

import pytest
import torch
from builders import tiny_model, token_ids
from latent_reference import SCALING, B, H, L, N, P, V, reference
from tolerance import assert_kernel_close

from kimi_linear import KimiLinearCache
from kimi_linear.ops.latent_attention import latent_attention
from kimi_linear.ops.latent_attention.expanded import FUSED_EXPANDED_TOKENS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
COMMON = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=96)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 3000), (5, 700), (300, 300), (1000, 2500), (1500, 1501)]
)
@torch.no_grad()
def test_both_forms_equal_plain_softmax(num_queries, num_keys, dtype, padded):
    torch.manual_seed(0)
    query = torch.randn(B, num_queries, H, N + P, device="cuda", dtype=dtype)
    latent = torch.randn(B, num_keys, L + P, device="cuda", dtype=dtype)
    halves = [0.05 * torch.randn(H, size, L, device="cuda", dtype=dtype) for size in (N, V)]
    real = None
    if padded:
        real = torch.ones(B, num_keys, dtype=torch.bool, device="cuda")
        real[0, : num_keys // 3], real[1, num_keys // 4 : num_keys // 2] = False, False
    out = latent_attention(
        query,
        latent.split((num_keys // 2, num_keys - num_keys // 2), dim=1),
        *halves,
        scaling=SCALING,
        real_BS=real,
    )
    assert_kernel_close(out, reference(query, latent, *halves, real), dtype)


def gpu_model(dtype):
    linear = {"full_attn_layers": [2, 4], "num_heads": 3, "head_dim": 64}
    linear["short_conv_kernel_size"] = 4
    fields = dict(num_experts=2, num_experts_per_token=2, hidden_size=64, initializer_range=0.1)
    return tiny_model(linear_attn_config=linear, **fields).to(dtype).cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_one_long_call_equals_chunks_and_steps(dtype):
    model, ids = gpu_model(dtype), token_ids(2, 2600).cuda()
    expected = model(ids, use_cache=False).logits
    cache, parts = KimiLinearCache(model.config), []
    for part in ids.split((1100, 1, 1, 200, 1298), dim=1):
        parts.append(model(part, cache=cache).logits)
    assert_kernel_close(torch.cat(parts, dim=1), expected, dtype)


@pytest.mark.parametrize("removed", [1, 9])
@torch.no_grad()
def test_rollback_replays_with_the_kernels(removed):
    model, ids, more = gpu_model(torch.float32), token_ids(2, 90).cuda(), token_ids(2, 5).cuda()
    cache = KimiLinearCache(model.config, rollback_tokens=20)
    for part in ids.split((80, 9, 1), dim=1):
        model(part, cache=cache)
    cache.crop(-removed)
    text = torch.cat([ids[:, : 90 - removed], more], dim=1)
    expected = model(text, use_cache=False).logits[:, -5:]
    parts = [model(part, cache=cache).logits for part in more.split((1, 3, 1), dim=1)]
    assert_kernel_close(torch.cat(parts, dim=1), expected, torch.float32)


@pytest.mark.parametrize("kind", ["offloaded", "static", "offloaded_static"])
def test_generate_with_other_caches(kind):
    model, ids = gpu_model(torch.float32), token_ids(2, 70).cuda()
    expected = model.generate(ids, **COMMON).tolist()
    assert model.generate(ids, cache_implementation=kind, **COMMON).tolist() == expected


def test_offloaded_latents_are_not_on_the_gpu():
    model, ids = gpu_model(torch.bfloat16), token_ids(1, 70).cuda()
    cache = KimiLinearCache(model.config, offload=True)
    with torch.no_grad():
        model(ids, cache=cache)
    assert [cache.layers[i].tail.device.type for i in (1, 3)] == ["cpu", "cpu"]


def test_prompt_lookup_gives_the_greedy_text():
    model, phrase = gpu_model(torch.float32), token_ids(1, 7).cuda()
    ids = torch.cat([phrase, phrase, phrase[:, :3]], dim=1)
    expected = model.generate(ids, **COMMON).tolist()
    assert model.generate(ids, prompt_lookup_num_tokens=5, **COMMON).tolist() == expected


@torch.no_grad()
def test_memory_of_a_chunk_does_not_grow_with_the_context():
    """What a chunk of 512 tokens needs above the cache, after two whole blocks and after four.

    Blocks of expanded keys and values have at most `FUSED_EXPANDED_TOKENS`; up to there it grows.
    """
    model = gpu_model(torch.bfloat16)
    cache = KimiLinearCache(model.config, rollback_tokens=0, reserve_tokens=1 << 17)
    needed = {}
    for length in range(512, 4 * FUSED_EXPANDED_TOKENS + 512, 512):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(token_ids(1, 512).cuda(), cache=cache, logits_to_keep=1)
        needed[length] = torch.cuda.max_memory_allocated() - before
    assert needed[4 * FUSED_EXPANDED_TOKENS] <= 1.1 * needed[2 * FUSED_EXPANDED_TOKENS]
