"""Attention over latents: both forms, any segments and blocks, against plain softmax."""

import pytest
import torch
from tolerance import assert_close

import kimi_linear.ops.latent_attention as module
from kimi_linear.ops.latent_attention import (
    absorbed,
    absorbed_is_cheaper,
    expanded,
    latent_attention,
    latent_attention_weights,
)

pytestmark = [pytest.mark.core, pytest.mark.kernels]

B, H, N, P, V, L = 3, 2, 5, 3, 7, 11
SCALING = 0.4
FORMS = ("absorbed", "expanded")


def make(num_queries, num_keys, dtype=torch.float64, batch_size=B):
    """query, latents, and the two halves of kv_b_proj."""
    generator = torch.Generator().manual_seed(num_queries * 1000 + num_keys)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        draw(batch_size, num_queries, H, N + P),
        draw(batch_size, num_keys, L + P),
        draw(H, N, L),
        draw(H, V, L),
    )


def reference(query, latent, key_half, value_half, real=None):
    """Expanded keys and values, one softmax: [B, T, H, V] and weights [B, H, T, S]."""
    query, latent, key_half, value_half = (
        x.double() for x in (query, latent, key_half, value_half)
    )
    T, S = query.shape[1], latent.shape[1]
    key = torch.einsum("bsl,hnl->bshn", latent[..., :L], key_half)
    key = torch.cat([key, latent[:, :, None, L:].expand(-1, -1, H, -1)], dim=-1)
    value = torch.einsum("bsl,hvl->bshv", latent[..., :L], value_half)
    scores = torch.einsum("bthk,bshk->bhts", query, key) * SCALING
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T).expand(len(query), 1, T, S)
    if real is not None:
        seen = seen & real[:, None, None]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0)
    return torch.einsum("bhts,bshv->bthv", weights, value), weights


def padding(num_keys):
    """Left, right and interior padding, one kind a row."""
    real = torch.ones(B, num_keys, dtype=torch.bool)
    real[0, : num_keys // 3] = False
    real[1, -(num_keys // 4) :] = False
    real[2, num_keys // 4 : num_keys // 2] = False
    return real


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Both forms, in blocks so small that every merge and every edge is met."""
    is_absorbed = request.param == "absorbed"
    monkeypatch.setattr(module, "absorbed_is_cheaper", lambda *args, **kwargs: is_absorbed)
    monkeypatch.setattr(absorbed, "MIN_BLOCK_TOKENS", 4)
    monkeypatch.setattr(absorbed, "SCORE_ELEMENTS", {"cpu": B * H * 4 * 3})
    monkeypatch.setattr(expanded, "EXPANDED_TOKENS", 8)
    return request.param


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (1, 40), (2, 3), (8, 8), (9, 33), (16, 48), (40, 40)]
)
def test_equals_one_softmax(form, num_queries, num_keys, padded):
    inputs = make(num_queries, num_keys)
    real = padding(num_keys) if padded else None
    out = latent_attention(inputs[0], [inputs[1]], *inputs[2:], scaling=SCALING, real_BS=real)
    assert_close(out, reference(*inputs, real)[0], torch.float64)


@pytest.mark.parametrize("lengths", [(1, 44), (20, 20, 5), (44, 1), (3,) * 15])
def test_segments_do_not_matter(form, lengths):
    query, latent, *halves = make(10, 45)
    real = padding(45)
    out = latent_attention(
        query, latent.split(lengths, dim=1), *halves, scaling=SCALING, real_BS=real
    )
    assert_close(out, reference(query, latent, *halves, real)[0], torch.float64)


def test_a_segment_of_one_row_serves_all_rows(form):
    query, latent, *halves = make(10, 45)
    first, rest = latent[:1, :30], latent[:, 30:]
    out = latent_attention(query, [first, rest], *halves, scaling=SCALING)
    joined = torch.cat([first.expand(B, -1, -1), rest], dim=1)
    assert_close(out, reference(query, joined, *halves)[0], torch.float64)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients(form, padded):
    inputs = [x.requires_grad_() for x in make(9, 21)]
    real = padding(21) if padded else None
    expected = torch.autograd.grad(reference(*inputs, real)[0].square().sum(), inputs)
    out = latent_attention(
        inputs[0], inputs[1].split((12, 9), dim=1), *inputs[2:], scaling=SCALING, real_BS=real
    )
    for got, want in zip(torch.autograd.grad(out.square().sum(), inputs), expected, strict=True):
        assert_close(got, want, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(form, dtype):
    inputs = make(9, 33, dtype)
    out = latent_attention(inputs[0], [inputs[1]], *inputs[2:], scaling=SCALING)
    assert out.dtype == dtype
    assert_close(out, reference(*inputs)[0], dtype)


def test_large_scores_neither_overflow_nor_lose_the_others(form):
    query, latent, *halves = make(3, 40)
    query = query * 200
    out = latent_attention(query, [latent], *halves, scaling=SCALING)
    assert_close(out, reference(query, latent, *halves)[0], torch.float64)


@pytest.mark.parametrize("padded", [False, True])
def test_weights(padded):
    inputs = make(9, 33)
    real = padding(33) if padded else None
    segments = inputs[1].split((20, 13), dim=1)
    out, weights = latent_attention_weights(
        inputs[0], segments, *inputs[2:], scaling=SCALING, real_BS=real
    )
    expected, expected_weights = reference(*inputs, real)
    sees = expected_weights.sum(-1)[:, 0] > 0  # [B, T]
    assert_close(out[sees], expected[sees], torch.float64)
    assert_close(
        weights.transpose(1, 2)[sees], expected_weights.transpose(1, 2)[sees], torch.float64
    )


def test_the_cheaper_form_of_the_48b_model():
    sizes = dict(key_dim=128, shared_dim=64, value_dim=128, rank=512)
    for num_queries, expected in ((1, True), (16, True), (160, True), (180, False), (4096, False)):
        assert absorbed_is_cheaper(num_queries, 1_000_000, **sizes) is expected
    assert not absorbed_is_cheaper(2048, 2048, **sizes)


@pytest.mark.parametrize(
    ("num_queries", "most", "expected"),
    [(200, 65536, 16384), (4096, 65536, 16384), (5000, 65536, 32768), (16384, 65536, 65536)]
    + [(131072, 65536, 65536), (4096, 400, 400)],
)
def test_few_queries_expand_few_keys_at_once(num_queries, most, expected):
    """4,096 tokens behind a long text would take 1.3 GB for keys and values otherwise."""
    assert expanded.keys_of_block(num_queries, most) == expected
