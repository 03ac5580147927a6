"""What one call of the backbone has to settle between its mask and its cache.

Shapes: B batch, T tokens of this call, S tokens of cache and call.
"""

from collections.abc import Iterable
from typing import Any

import torch
from kimi_linear.cache.rollback import KDAPlan, plan_call
from kimi_linear.inputs.layout import SequenceLayout
from torch import Tensor
from torch.nn import Identity, Module
from transformers.cache_utils import Cache


def check_source(source: Any, name: str) -> None:
    """ValueError unless the input, of that name, is a tensor of rows of tokens.

    Raises:
        RuntimeError: Under `torch.jit.trace`, whose program would go on with this call's sizes.
    """
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace is not supported: torch.export.export takes this model")
    if not isinstance(source, Tensor):
        raise ValueError(f"{name}={type(source).__name__} is not allowed: it must be a tensor")
    axes = ["batch", "tokens", "hidden_size"][: 3 if name == "inputs_embeds" else 2]
    if source.ndim != len(axes) or source.shape[0] == 0 or source.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(source.shape)}, which is not allowed: it must be "
            f"[{', '.join(axes)}] with at least 1 row and 1 token"
        )


def unless_all_real(attention_mask: Tensor | None) -> Tensor | None:
    """The mask, or None where it says nothing. A compiler cannot look, and takes it as it is."""
    if attention_mask is None or torch.compiler.is_compiling():
        return attention_mask
    return None if bool((attention_mask != 0).all()) else attention_mask


def check_columns(attention_mask: Tensor | None, past: int, num_tokens: int) -> None:
    """ValueError unless the mask covers the cached and the new tokens."""
    if attention_mask is not None and attention_mask.shape[1] != past + num_tokens:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns, which is not allowed: it "
            f"must cover the {past} cached and the {num_tokens} new tokens"
        )


def note_padding(
    cache: Cache, attention_mask: Tensor | None, mask: Tensor | None, past: int
) -> None:
    """Let the cache know whether it holds padding; ValueError if the mask contradicts it.

    Args:
        cache: The cache, with `past` tokens.
        attention_mask: As it was given.
        mask: The same, or None if it has no zeros.
    """
    had_padding = cache.layers[0].has_padding
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
            "read as real tokens, and KDA states cannot leave them out any more (generate() takes "
            "pad tokens for padding where it is given no mask)"
        )
    for layer in cache.layers:
        layer.has_padding = True


def plan_kda(
    hidden_states: Tensor, mask: Tensor | None, cache: Cache | None, layout: SequenceLayout
) -> KDAPlan | None:
    """How KDA layers read this call; None without a cache or without such layers."""
    layers = [] if cache is None else cache.layers
    layers = [layer for layer in layers if hasattr(layer, "num_logged")]
    if not layers:
        return None
    # in a pipeline, another process has the first ones
    layer = next((layer for layer in layers if layer.num_rows is not None), layers[0])
    return plan_call(
        hidden_states.shape[1],
        layout,
        rollback_tokens=layer.rollback_tokens,
        num_logged=layer.num_logged,
        is_stale=layer.is_stale,
        batch_size=hidden_states.shape[0],
        attention_mask=mask,
        device=hidden_states.device,
    )


def count_elsewhere(modules: Iterable[Module], cache: Cache | None) -> None:
    """In a pipeline, let the cache layers of other processes' modules count tokens too."""
    if cache is None:
        return
    pairs = zip(modules, cache.layers, strict=True)
    for layer in [layer for module, layer in pairs if isinstance(module, Identity)]:
        layer.num_tokens = max(each.num_tokens for each in cache.layers)


__all__ = [
    "check_columns",
    "check_source",
    "count_elsewhere",
    "note_padding",
    "plan_kda",
    "unless_all_real",
]
