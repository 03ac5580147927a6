"""Texts of different lengths in one call, each with a cache of its own."""

import pytest
import torch
from builders import PATTERNS, tiny_model, token_ids
from tolerance import assert_close, assert_kernel_close

from kimi_linear import KimiLinearCache

pytestmark = pytest.mark.core


def new_caches(model, count, **kwargs):
    return [KimiLinearCache(model.config, rollback_tokens=0, **kwargs) for _ in range(count)]


def wide_model(pattern="hybrid"):
    model = tiny_model(pattern).double()
    model.set_experts_implementation("eager")
    return model


def read_together(model, caches, texts):
    """Logits of each text's tokens [1, tokens, vocab_size]."""
    counts = [text.shape[1] for text in texts]
    ends = torch.tensor([0, *counts]).cumsum(0)
    out = model(torch.cat(texts, dim=1), cu_seq_lens_q=ends, cache=caches)
    assert out.cache is not None and all(map(lambda a, b: a is b, out.cache, caches))
    return out.logits.split(counts, dim=1)


def read_alone(model, caches, texts):
    """The same, one call for each text that has tokens."""
    empty = torch.empty(1, 0, model.config.vocab_size)
    both = zip(caches, texts, strict=True)
    return [model(text, cache=c).logits if text.shape[1] else empty for c, text in both]


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_each_text_is_read_as_if_alone(pattern):
    """Piece after piece, some without a token; then each goes on by itself."""
    model = wide_model(pattern)
    together, alone = new_caches(model, 3), new_caches(model, 3)
    for i, counts in enumerate([(70, 3, 0), (0, 1, 130), (5, 0, 2), (1, 1, 1)]):
        texts = [token_ids(1, n, seed=10 * i + j) for j, n in enumerate(counts)]
        found = read_together(model, together, texts)
        for one, other in zip(found, read_alone(model, alone, texts), strict=True):
            assert_close(one, other, torch.float64)
        assert [c.get_seq_length() for c in together] == [c.get_seq_length() for c in alone]
    for one, other in zip(together, alone, strict=True):
        ids = token_ids(1, 4, seed=99)
        assert_close(model(ids, cache=one).logits, model(ids, cache=other).logits, torch.float64)
        assert one.cache_memory() == other.cache_memory()


@torch.no_grad()
def test_texts_go_on_from_a_prefix():
    model = wide_model()
    (prefix,) = new_caches(model, 1)
    model(token_ids(1, 40), cache=prefix)
    forks, alone = [[prefix.fork() for _ in range(3)] for _ in range(2)]
    texts = [token_ids(1, n, seed=n) for n in (9, 1, 66)]
    found = read_together(model, forks, texts)
    for one, other in zip(found, read_alone(model, alone, texts), strict=True):
        assert_close(one, other, torch.float64)
    assert prefix.get_seq_length() == 40


def test_gradients_of_texts_read_together():
    model = wide_model()
    texts = [token_ids(1, n, seed=n) for n in (9, 20)]
    grads = []
    for read in (read_together, read_alone):
        model.zero_grad()
        torch.cat(read(model, new_caches(model, 2), texts), dim=1).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        assert_close(one, other, torch.float64)


@torch.no_grad()
def test_what_a_list_of_caches_refuses():
    model, ids = tiny_model(), token_ids(1, 6)
    ends = torch.tensor([0, 2, 6])

    def call(caches, *, ids=ids, **kwargs):
        return model(ids, **{"cu_seq_lens_q": ends, "cache": caches, **kwargs})

    caches = new_caches(model, 2)
    for wrong, name in (
        ({"cu_seq_lens_q": None}, "cu_seq_lens_q"),
        ({"attention_mask": torch.ones_like(ids)}, "attention_mask"),
        ({"seq_idx": torch.zeros_like(ids)}, "seq_idx"),
        ({"ids": token_ids(2, 3)}, "one row"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "2 caches"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "= 6"),
    ):
        with pytest.raises(ValueError, match=name):
            call(caches, **wrong)
    with pytest.raises(ValueError, match="same cache twice"):
        call(caches[:1] * 2)
    with pytest.raises(ValueError, match=r"cache\[1\] has rollback_tokens=64"):
        call([caches[0], KimiLinearCache(model.config)])
    two_rows, padded = new_caches(model, 2)
    model(token_ids(2, 3), cache=two_rows)
    model(token_ids(1, 3), attention_mask=torch.tensor([[0, 1, 1]]), cache=padded)
    for cache, found in ((two_rows, "2 rows"), (padded, "padding")):
        with pytest.raises(ValueError, match=rf"cache\[0\] has {found}"):
            call([cache, caches[0]])
    assert all(cache.get_seq_length() == 0 for cache in caches)  # nothing was read
    call(caches)


@torch.no_grad()
def test_an_error_inside_marks_all_caches(monkeypatch):
    model = tiny_model()
    caches = new_caches(model, 2)
    experts = model.model.layers[2].block_sparse_moe
    monkeypatch.setattr(experts, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read_together(model, caches, [token_ids(1, 2), token_ids(1, 3)])
    for cache in caches:
        with pytest.raises(ValueError, match="a part of a call that an error ended"):
            model(token_ids(1, 2), cache=cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_texts_on_a_gpu(dtype):
    linear = {"full_attn_layers": [2, 4], "num_heads": 3, "head_dim": 64}
    linear["short_conv_kernel_size"] = 4
    model = tiny_model(linear_attn_config=linear, hidden_size=64).to(dtype).cuda()
    together, alone = new_caches(model, 3), new_caches(model, 3)
    for i, counts in enumerate([(300, 3, 0), (0, 1, 1300), (5, 70, 2)]):
        texts = [token_ids(1, n, seed=10 * i + j).cuda() for j, n in enumerate(counts)]
        found = read_together(model, together, texts)
        for text, one, cache in zip(texts, found, alone, strict=True):
            if text.shape[1]:
                # both round
                assert_kernel_close(one, model(text, cache=cache).logits, dtype, excess=1.5)
