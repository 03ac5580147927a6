"""`upstream/caches.py`: Transformers' caches and their name in its loop are as they were."""

import pytest
import torch
import transformers
from builders import tiny_model, token_ids
from touchpoints import CHANGED, find

from kimi_linear.upstream.caches import CACHE_NAME, holds_tokens, is_offloading

pytestmark = pytest.mark.core


def test_the_loop_names_its_cache_as_this_package_thinks():
    """`CACHE_NAME` is what the loop hands over, looks for in outputs and reorders."""
    name, model = CACHE_NAME, tiny_model()
    with torch.no_grad():
        out = model(token_ids(1, 4), use_cache=True)
    kept = model._update_model_kwargs_for_generation(out, {})
    assert kept.get(name) is out.cache, f"generate() does not keep `{name}` but {kept}: {CHANGED}"
    names = find("generation.utils:ALL_CACHE_NAMES")
    assert name in names, f"ALL_CACHE_NAMES={names} has no {name!r}: {CHANGED}"


def test_a_dynamic_cache_takes_other_layers():
    model, cache = tiny_model(), transformers.DynamicCache()
    assert hasattr(cache, "layer_class_to_replicate"), (
        f"DynamicCache.layer_class_to_replicate is gone: {CHANGED}"
    )
    assert not holds_tokens(cache) and not is_offloading(cache)
    with torch.no_grad():
        model(token_ids(1, 5), cache=cache)
    assert len(cache.layers) == 4 and holds_tokens(cache), CHANGED
    used = transformers.DynamicCache()
    used.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    assert holds_tokens(used), f"its layers have no is_initialized: {CHANGED}"
    offloading = transformers.DynamicCache(offloading=True)
    assert is_offloading(offloading), f"DynamicCache.offloading is gone: {CHANGED}"
