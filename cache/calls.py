"""Which cache a call reads and writes."""

from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from kimi_linear.cache.hybrid import prepare_cache
from kimi_linear.inputs.layout import SequenceLayout

logger = logging.get_logger(__name__)


def cache_for_call(
    model: Any,
    layout: SequenceLayout,
    cache: Cache | None,
    use_cache: bool | None,
    batch_size: int,
) -> Any:
    """The cache to read and write, or None.

    Args:
        model: The backbone.
        layout: The call's padding and packing.
        cache, use_cache: As the backbone's.
        batch_size: Rows of the call.

    Raises:
        ValueError: For a cache under gradient checkpointing, with packed sequences, or of another
            number of rows; and as `prepare_cache`.
    """
    if model.gradient_checkpointing and model.training and torch.is_grad_enabled():
        if cache is not None:
            raise ValueError("cache is not allowed under gradient checkpointing: it must be None")
        if use_cache:
            logger.warning_once("use_cache=True has no effect under gradient checkpointing")
        return None
    if layout.is_packed:
        if use_cache or cache is not None:
            raise ValueError(
                "packed sequences cannot be combined with a cache: pass use_cache=False and no "
                "cache, or cu_seq_lens_q and a list of caches, one for each sequence"
            )
        return None
    if use_cache is None:
        use_cache = model.config.use_cache and not model.training
    if not use_cache and cache is None:
        return None
    # a given cache counts whatever use_cache says: the tokens it holds are part of the text
    cache = prepare_cache(cache, model.config)
    rows = next((layer.num_rows for layer in cache.layers if layer.num_rows is not None), None)
    if rows not in (None, batch_size):
        raise ValueError(
            f"cache holds {rows} rows, which is not allowed: it must be the input's {batch_size}"
        )
    return cache
