"""Transformers' own caches, and what its loop calls one."""

import inspect
from typing import Any

from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin

# What the loop calls the cache that it hands from step to step: renamed by 5.24.
CACHE_NAME = (
    "past_key_values"
    if "past_key_values"
    in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "cache"
)


def put_layers(cache: Cache, layers: list[Any]) -> None:
    """Replace the layers of an empty `DynamicCache`, and keep it from adding some of its own."""
    cache.layers = layers
    cache.layer_class_to_replicate = None


def holds_tokens(cache: Cache) -> bool:
    """Whether a cache of Transformers has been written to."""

    def has_state(layer: Any) -> bool:  # of linear attention; 5.24: one for each of its states
        flags = getattr(layer, "has_previous_state", False)
        return any(flags.values()) if isinstance(flags, dict) else bool(flags)

    layers = getattr(cache, "layers", [])
    return any(getattr(each, "is_initialized", False) or has_state(each) for each in layers)


def is_offloading(cache: Cache) -> bool:
    """Whether a `DynamicCache` was made with `offloading=True`."""
    return bool(getattr(cache, "offloading", False))
