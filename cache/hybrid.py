"""The hybrid cache: a fixed-size state for each KDA layer, growing latents for each MLA layer.

A KDA layer keeps the last W - 1 inputs of its convolutions and one float32 matrix per head,
whatever the context; and, so that `crop` can take tokens back, an anchor and a log (`rollback.py`).
An MLA layer keeps R = kv_lora_rank + qk_rope_head_dim numbers per token, shared by all heads, in
buffers that grow by blocks. Both are layers of a Transformers `Cache`, so that `generate()` handles
them like any other.

Shapes: B batch, S tokens seen, T tokens of a call, R latent width, H heads, K key size, V value
size, D = H * K, W convolution width, X hidden size.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from kimi_linear.cache.kda import ROLLBACK_TOKENS, KDALayerCache
from kimi_linear.cache.latents import LatentLayerCache
from kimi_linear.cache.layer import LayerCache
from kimi_linear.upstream.caches import holds_tokens, is_offloading, put_layers


class KimiLinearCache(Cache):
    """Cache of a Kimi Linear model, one layer of the right kind per decoder layer.

    Args:
        config: A `KimiLinearConfig`; only its `layer_types` are read.
        rollback_tokens: Minimum number of trailing tokens `crop` can remove; `rollback.py` says
            what that costs. 0 disables it, and costs nothing.
        reserve_tokens: Room for the latents of this many tokens is made at once.
        offload: Keep latents in the CPU's memory; attention fetches them block by block.

    Raises:
        ValueError: If a number is negative.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        rollback_tokens: int = ROLLBACK_TOKENS,
        reserve_tokens: int = 0,
        offload: bool = False,
    ) -> None:
        numbers = {"rollback_tokens": rollback_tokens, "reserve_tokens": reserve_tokens}
        for name, value in numbers.items():
            if value < 0:
                raise ValueError(f"{name}={value} is not allowed: it must be at least 0")
        layers = _layers_for(config, rollback_tokens, reserve_tokens, offload)
        Cache.__init__(self, layers=layers)  # subclasses are another cache of Transformers too

    num_reorders = 0  # since it was made, so that a beam search that does not is found out
    is_torn = False  # between the first write of a call and its end

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows into the order of `beam_idx` [B]."""
        super().reorder_cache(beam_idx)
        self.num_reorders += 1

    def cache_memory(self) -> dict[str, int]:
        """Bytes held, see the function `cache_memory`."""
        return cache_memory(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, in all layers or in none.

        Args:
            tokens_to_remove: -n removes n tokens, as in Transformers; a positive number is how many
                stay, as in older versions; 0 does nothing.

        Raises:
            ValueError: If the KDA layers cannot go back so far, or an error ended the call before.
        """
        if tokens_to_remove == 0:
            return
        check_whole(self)
        for layer in self.layers:
            layer.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    @property
    def kda_layers(self) -> list[KDALayerCache]:
        """Those of KDA layers."""
        return [layer for layer in self.layers if isinstance(layer, KDALayerCache)]

    def begin_draft(self) -> None:
        """Have `crop` remove the next call's tokens, up to `STEP_TOKENS`, from a cache that keeps
        no log. It costs a copy of the states."""
        for layer in self.kda_layers:
            layer.begin_draft()

    def end_draft(self) -> None:
        """Keep no log again; to be called after that crop."""
        for layer in self.kda_layers:
            layer.end_draft()

    def note_padding(self, attention_mask: Tensor | None, mask: Tensor | None) -> None:
        """Record whether the cache holds padding; ValueError if the mask contradicts it.

        Args:
            attention_mask: [B, S], as it was given.
            mask: The same, or None if it has no zeros.
        """
        past, had_padding = self.get_seq_length(), self.layers[0].has_padding
        if had_padding and attention_mask is None:
            raise ValueError(
                "attention_mask=None is not allowed here: cache holds padding, so that it "
                "must be [batch, tokens] with a column for each cached and each new token"
            )
        if mask is None:
            return
        is_looking = not torch.compiler.is_compiling()
        if is_looking and not had_padding and bool((mask[:, :past] == 0).any()):
            raise ValueError(
                "attention_mask has zeros among the cached tokens, which is not allowed: they were "
                "read as real tokens, and KDA states cannot leave them out any more (generate() "
                "takes pad tokens for padding where it is given no mask)"
            )
        for layer in self.layers:
            layer.has_padding = True

    def begin_call(self) -> None:
        """Until `end_call`, some layers may have read tokens that others have not."""
        self.is_torn = True

    def end_call(self, modules: Iterable[nn.Module]) -> None:
        """All layers have read the call; in a pipeline, the caches of layers that other processes
        have (`nn.Identity` here) count its tokens too."""
        for module, layer in zip(modules, self.layers, strict=True):
            if isinstance(module, nn.Identity):
                layer.num_tokens = max(each.num_tokens for each in self.layers)
        self.is_torn = False

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.is_torn = False

    def copy(self) -> "KimiLinearCache":
        """An independent copy, all memory included."""
        return copy.deepcopy(self)

    def fork(self) -> "KimiLinearCache":
        """An independent cache that continues from here and shares the latents so far.

        KDA states are copied; the latents up to here are shared, and copied by whoever crops into
        them and goes on.
        """
        other = copy.copy(self)
        other.layers = [layer.fork() for layer in self.layers]
        return other


class KimiLinearDynamicCache(KimiLinearCache, DynamicCache):
    """A `KimiLinearCache` that is known as a `DynamicCache`: `generate()` makes it, and a
    `DynamicCache` becomes it when a Kimi Linear model writes to it."""


def cache_memory(cache: Cache) -> dict[str, int]:
    """Bytes that a Kimi Linear cache holds, by purpose.

    Returns:
        "linear_attention": KDA states (fixed); "full_attention": latents (growing by token);
        "rollback": what `crop` needs (bounded).
    """
    total = {"linear_attention": 0, "full_attention": 0, "rollback": 0}
    for layer in cache.layers:
        for kind, size in layer.memory_bytes().items():
            total[kind] += size
    return total


def check_whole(cache: Cache) -> None:
    """Raise ValueError if an exception ended a call that has written to the cache."""
    if getattr(cache, "is_torn", False):
        raise ValueError(
            "cache holds a part of a call that an error ended, which is not allowed: start from a "
            "copy, or reset() it"
        )


def check_one_text(cache: Cache, name: str) -> None:
    """Raise ValueError unless the cache, an argument of that name, is of one text without
    padding."""
    layers: list[Any] = cache.layers
    rows = next((layer.num_rows for layer in layers if layer.num_rows is not None), 1)
    if rows != 1 or layers[0].has_padding:
        found = "padding" if rows == 1 else f"{rows} rows"
        raise ValueError(
            f"{name} has {found}, which is not allowed: it must have one text's tokens"
        )


def check_kinds(cache: Cache, config: PreTrainedConfig) -> None:
    """Raise ValueError unless the cache has a layer of the right kind for each of the model's."""
    kinds, needed = [layer.kind for layer in cache.layers], config.layer_types
    if kinds == needed:
        return
    if len(kinds) != len(needed):
        raise ValueError(
            f"cache has {len(kinds)} layers, which is not allowed: it must have "
            f"num_hidden_layers={len(needed)}"
        )
    i = next(i for i, kind in enumerate(needed) if kind != kinds[i])
    raise ValueError(
        f"cache.layers[{i}] is one of {kinds[i]}, which is not allowed: it must be one of "
        f"{needed[i]}, as the model's layer is"
    )


def prepare_cache(cache: Cache | None, config: PreTrainedConfig) -> Any:
    """A Kimi Linear cache: a new one for None, the given one if it is one or still empty.

    Raises:
        ValueError: If another cache already holds tokens, or is of a kind that our layers cannot
            stand in for, or if its layers are not the model's kinds or do not hold equally many
            tokens.
    """
    if cache is None:
        return KimiLinearCache(config)
    layers = getattr(cache, "layers", [])
    if layers and all(hasattr(layer, "memory_bytes") for layer in layers):
        check_kinds(cache, config)
        check_whole(cache)
        if not isinstance(cache, KimiLinearCache):  # made by hand of our layers
            cache.__class__ = KimiLinearCache
        counts = {layer.num_tokens for layer in layers}
        if len(counts) > 1:
            raise ValueError(
                f"cache has layers of {min(counts)} and of {max(counts)} tokens, which "
                "is not allowed: an error ended the call before; start from a copy, or reset() it"
            )
        return cache
    name = type(cache).__name__
    if name != "DynamicCache":
        raise ValueError(
            f"cache={name} is not supported: it must be a KimiLinearCache, "
            "a DynamicCache or None; KimiLinearCache(config, reserve_tokens=...) makes room in "
            "advance, as generate(cache_implementation='static') does"
        )
    if holds_tokens(cache):
        raise ValueError(
            f"cache={name} holds tokens that this model did not write: it must be empty (PEFT's "
            "prefix tuning puts keys and values there, which this model's cache has no place for: "
            "use another kind of adapter)"
        )
    put_layers(cache, _layers_for(config, ROLLBACK_TOKENS, 0, is_offloading(cache)))
    cache.__class__ = KimiLinearDynamicCache
    return cache


def _layers_for(
    config: PreTrainedConfig, rollback_tokens: int, reserve_tokens: int, offload: bool
) -> list[LayerCache]:
    return [
        KDALayerCache(rollback_tokens)
        if kind == "linear_attention"
        else LatentLayerCache(reserve_tokens, offload)
        for kind in config.layer_types
    ]
