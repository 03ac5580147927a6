"""Prefill on a GPU: attention by cuDNN, the leaner experts and router, layers in pieces of tokens,
each beside what it takes the place of and a run in higher precision."""

import pytest
import torch
from builders import tiny_model, token_ids
from latent_reference import SCALING, B, H, L, N, P, V, reference
from tolerance import assert_kernel_close
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from kimi_linear import KimiLinearCache
from kimi_linear.cache import pieces
from kimi_linear.layers import latent_attention as latent_layer
from kimi_linear.ops import gated_mlp
from kimi_linear.ops.experts import prefill
from kimi_linear.ops.latent_attention import cudnn, expanded, latent_attention, sdpa
from kimi_linear.ops.latent_attention.sdpa import attention_by_sequence

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
# The new path may be this much further from a float32 run than the path whose place it takes.
EXCESS = 1.5


def error(x, expected):
    return ((x.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(700, 700), (1024, 1024), (513, 2900), (1500, 1501)]
)
@torch.no_grad()
def test_cudnn_with_merged_blocks_equals_plain_softmax(monkeypatch, num_queries, num_keys, dtype):
    calls = []
    by_cudnn = expanded.cudnn_attention

    def spy(*args):
        calls.append(by_cudnn(*args))
        return calls[-1]

    monkeypatch.setattr(expanded, "cudnn_attention", spy)
    for name in ("CUDNN_PAIRS", "CUDNN_OWN_PAIRS"):
        monkeypatch.setattr(cudnn, name, 1)
    monkeypatch.setattr(expanded, "EXPANDED_TOKENS", 1)
    monkeypatch.setattr(expanded, "FUSED_QUERY_TOKENS", B * 600)
    monkeypatch.setattr(expanded, "FUSED_EXPANDED_TOKENS", B * 400)
    query = torch.randn(B, num_queries, H, N + P, device="cuda", dtype=dtype)
    latent = torch.randn(B, num_keys, L + P, device="cuda", dtype=dtype)
    halves = [0.05 * torch.randn(H, size, L, device="cuda", dtype=dtype) for size in (N, V)]
    out = latent_attention(query, [latent], *halves, scaling=SCALING)
    assert len(calls) > 1
    assert all(call is not None for call in calls), "cuDNN was not used"
    assert_kernel_close(out, reference(query, latent, *halves, None), dtype)


@pytest.mark.parametrize("ends", [[0, 700], [0, 513, 1024, 1100]])
def test_cudnn_trains_each_sequence(monkeypatch, ends):
    """Its gradients are no further from float64 than those of what it takes the place of."""
    sizes = (192, 192, 128)
    torch.manual_seed(0)
    heads = [torch.randn(1, ends[-1], 4, size, device="cuda").bfloat16() for size in sizes]
    out_grad = torch.randn(1, ends[-1], 4, 128, device="cuda").bfloat16()

    def run(dtype):
        q, k, v = (each.to(dtype).requires_grad_() for each in heads)
        options = {"scaling": 192**-0.5}
        out = attention_by_sequence(q, k.transpose(1, 2), v.transpose(1, 2), ends, **options)
        return out, *torch.autograd.grad(out, (q, k, v), out_grad.to(dtype))

    expected, flash = run(torch.float64), run(torch.bfloat16)
    calls = []
    by_cudnn = sdpa.cudnn_attention
    monkeypatch.setattr(
        sdpa, "cudnn_attention", lambda *args: calls.append(by_cudnn(*args)) or calls[-1]
    )
    monkeypatch.setattr(cudnn, "CUDNN_OWN_PAIRS", 1)
    found = run(torch.bfloat16)
    assert len(calls) == len(ends) - 1 and all(call is not None for call in calls)
    for own, old, true in zip(found, flash, expected, strict=True):
        assert error(own, true) <= EXCESS * error(old, true)


def moe_model(dtype=torch.bfloat16, **fields):
    fields = {"num_experts": 12, "num_experts_per_token": 3, "initializer_range": 0.1, **fields}
    return tiny_model(hidden_size=64, moe_intermediate_size=40, **fields).to(dtype).cuda()


@torch.no_grad()
def test_lean_experts_are_as_exact_as_the_grouped_ones(monkeypatch):
    experts = moe_model().model.layers[1].block_sparse_moe.experts
    x = torch.randn(301, 64, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(301, 12, device="cuda").topk(3, dim=-1).indices
    index[index == 5] = 4  # an expert without tokens, and tokens that choose one twice
    weights = torch.rand(301, 3, device="cuda")
    assert prefill.can_prefill(experts, x)
    monkeypatch.setattr(prefill, "PIECE_TOKENS", 100)
    out = experts(x, index, weights)
    assert torch.equal(out, experts(x, index, weights))
    old = ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, x, index, weights)
    wide = moe_model(torch.float32).model.layers[1].block_sparse_moe.experts
    wide.load_state_dict(experts.state_dict())
    wide.config._experts_implementation = "eager"
    expected = wide(x.float(), index, weights)
    assert error(out, expected) <= EXCESS * error(old, expected)


@torch.no_grad()
def test_lean_experts_leave_out_experts_of_other_ranks():
    experts = moe_model().model.layers[1].block_sparse_moe.experts
    x = torch.randn(50, 64, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(50, 12, device="cuda").topk(3, dim=-1).indices
    weights = torch.rand(50, 3, device="cuda")
    expected = experts(x, index.clamp(max=11), weights.masked_fill(index % 2 == 0, 0))
    out = experts(x, index.masked_fill(index % 2 == 0, 12), weights)
    assert_kernel_close(out, expected, torch.bfloat16)


@torch.no_grad()
def test_router_chooses_as_in_float32():
    router = moe_model().model.layers[1].block_sparse_moe.gate
    router.e_score_correction_bias.uniform_(-0.1, 0.1)
    x = torch.randn(500, 64, device="cuda", dtype=torch.bfloat16)
    logits, weights, experts = router(x)
    with torch.enable_grad():  # the path of training
        expected_logits, expected_weights, expected = router(x.clone().requires_grad_())
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    order, expected_order = experts.argsort(dim=1), expected.argsort(dim=1)
    assert torch.equal(experts.gather(1, order), expected.gather(1, expected_order))
    assert_kernel_close(
        weights.gather(1, order), expected_weights.gather(1, expected_order), torch.float32
    )


@torch.no_grad()
def test_pieces_of_tokens_equal_the_whole(monkeypatch):
    linear = {"full_attn_layers": [2, 4], "num_heads": 3, "head_dim": 64}
    linear["short_conv_kernel_size"] = 4
    # every token uses every expert: the kernels round to tf32, which must not choose experts
    model = moe_model(torch.float32, linear_attn_config=linear, num_experts_per_token=12)
    ids, more = token_ids(2, 1500).cuda(), token_ids(2, 7).cuda()

    def read():
        cache = KimiLinearCache(model.config)
        parts = [model(ids, cache=cache).logits]
        cache.crop(-20)
        return torch.cat([*parts, model(more, cache=cache).logits], dim=1)

    expected = read()
    monkeypatch.setattr(pieces, "READ_TOKENS", 2 * 256)
    monkeypatch.setattr(gated_mlp, "PIECE_TOKENS", 700)
    monkeypatch.setattr(latent_layer, "FUSED_QUERY_TOKENS", 1024)
    assert_kernel_close(read(), expected, torch.float32)


def test_gradients_do_not_go_through_the_kernels():
    model = moe_model()
    model(token_ids(1, 70).cuda(), labels=token_ids(1, 70).cuda()).loss.backward()
    layer = model.model.layers[1].block_sparse_moe
    for parameter in (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
        assert parameter.grad is not None
        assert bool(parameter.grad.abs().sum() > 0)
