"""A cached call that an exception ends: its cache is refused, and nothing else is."""

import pytest
import torch
from builders import tiny_model, token_ids
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from kimi_linear import KimiLinearCache, save_session

pytestmark = pytest.mark.core

IDS = token_ids(1, 12)
REFUSED = "cache holds a part of a call that an error ended"
COMMON = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=96)


@pytest.fixture
def model():
    return tiny_model("alternating")


def interrupt(model, number, before=True):
    """Have a module of layer `number` raise once."""

    def stop(*args):
        handle.remove()
        raise KeyboardInterrupt

    layer = model.model.layers[number]
    module = layer.input_layernorm if before else layer.post_attention_layernorm
    handle = module.register_forward_hook(stop)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("make", [lambda config: KimiLinearCache(config), lambda _: DynamicCache()])
def test_a_call_that_an_exception_ended_leaves_a_cache_that_is_refused(
    model, tmp_path, number, before, make
):
    cache = make(model.config)
    with torch.no_grad():
        model(IDS[:, :5], cache=cache)
        copied = cache.fork()
        interrupt(model, number, before)
        with pytest.raises(KeyboardInterrupt):
            model(IDS[:, 5:8], cache=cache)
        for call in (
            lambda: model(IDS[:, 5:8], cache=cache),
            lambda: model.generate(IDS, cache=cache, **COMMON),
            lambda: cache.crop(-1),
            lambda: save_session(tmp_path / "it", cache, model, IDS),
        ):
            with pytest.raises(ValueError, match=REFUSED):
                call()
        assert not list(tmp_path.iterdir())
        whole = model(IDS, use_cache=False).logits
        torch.testing.assert_close(model(IDS[:, 5:], cache=copied).logits, whole[:, 5:])
        cache.reset()
        torch.testing.assert_close(model(IDS, cache=cache).logits, whole)


def test_a_refused_call_leaves_the_cache_as_it_was(model):
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        model(IDS[:, :5], cache=cache)
        with pytest.raises(ValueError, match="attention_mask has 3 columns"):
            model(IDS[:, 5:8], attention_mask=torch.tensor([[0, 1, 1]]), cache=cache)
        assert not cache.layers[0].has_padding
        whole = model(IDS, use_cache=False).logits
        torch.testing.assert_close(model(IDS[:, 5:], cache=cache).logits, whole[:, 5:])


class Raises(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > IDS.shape[1] + 1:
            raise RuntimeError("enough")
        return scores


@pytest.mark.parametrize("drafted", [False, True])
def test_drafted_tokens_of_a_generate_that_raises(model, drafted):
    """Without drafts, all that the cache holds is text."""
    cache = KimiLinearCache(model.config)
    options = {"prompt_lookup_num_tokens": 3} if drafted else {}
    with pytest.raises(RuntimeError, match="enough"):
        model.generate(
            IDS, cache=cache, logits_processor=LogitsProcessorList([Raises()]), **options, **COMMON
        )
    if drafted:
        with pytest.raises(ValueError, match=REFUSED):
            model(IDS[:, :1], cache=cache)
    else:
        with torch.no_grad():
            model(IDS[:, :1], cache=cache)
