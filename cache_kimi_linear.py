"""The hybrid cache: a fixed-size state for each KDA layer, a growing latent for each MLA layer.

A KDA layer keeps the last W - 1 inputs of its convolutions and one float32 matrix per head,
whatever the context. An MLA layer keeps R = kv_lora_rank + qk_rope_head_dim numbers per token,
shared by all heads, in a buffer that grows by blocks. Both are layers of a Transformers `Cache`, so
that `generate()` handles them like any other.

Shapes: B batch, S tokens seen, R latent width, H heads, K key size, V value size, D = H * K, W
convolution width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig

BLOCK_TOKENS = 256


class _LayerCache(CacheLayerMixin):
    """What both kinds share: they count tokens and select rows of their tensors."""

    is_sliding = False
    supports_early_init = False
    _tensors: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        for name in self._tensors:
            setattr(self, name, None)
        self.num_tokens = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    @property
    def num_rows(self) -> int | None:
        """B, or None while empty."""
        return next((x.shape[0] for x in self._present().values()), None)

    def memory_bytes(self) -> int:
        """Bytes of the tensors that this layer holds."""
        return sum(x.numel() * x.element_size() for x in self._present().values())

    def _present(self) -> dict[str, Tensor]:
        tensors = {name: getattr(self, name) for name in self._tensors}
        return {name: x for name, x in tensors.items() if x is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        for name, x in self._present().items():
            setattr(self, name, function(x))


class KDALayerCache(_LayerCache):
    """State of one KDA layer.

    Attributes:
        conv_state: [B, 3, D, W - 1], the last inputs of the q, k and v convolutions, oldest first;
            None if empty.
        recurrent_state: [B, H, K, V] float32; None if empty.
        num_tokens: Tokens seen, padding included.
    """

    _tensors = ("conv_state", "recurrent_state")

    def __init__(self) -> None:
        super().__init__()
        self.conv_state: Tensor | None = None
        self.recurrent_state: Tensor | None = None

    def update(  # type: ignore[override]
        self, conv_state: Tensor | None, recurrent_state: Tensor | None, num_new: int
    ) -> None:
        """Replace the states by those after `num_new` more tokens (padding included)."""
        self.conv_state, self.recurrent_state = conv_state, recurrent_state
        self.num_tokens += num_new
        self.is_initialized = True

    def crop(self, max_length: int) -> None:
        raise ValueError(
            f"crop({max_length}) is not possible: a KDA layer keeps only its last state and "
            "cannot go back. Start again from the prompt, or keep a copy of the cache"
        )


class LatentLayerCache(_LayerCache):
    """Latents of one MLA layer.

    Attributes:
        buffer: [B, capacity, R], of which the first `num_tokens` are in use; None if empty.
        num_tokens: S.
    """

    _tensors = ("buffer",)

    def __init__(self) -> None:
        super().__init__()
        self.buffer: Tensor | None = None

    def update(self, latent: Tensor) -> Tensor:  # type: ignore[override]
        """Append [B, T, R] and return all [B, S, R]."""
        end = self.num_tokens + latent.shape[1]
        if torch.is_grad_enabled():  # a buffer written in place would break autograd
            past = [] if self.buffer is None else [self.buffer[:, : self.num_tokens]]
            self.buffer = torch.cat([*past, latent], dim=1)
        else:
            self.buffer = self._reserved(latent, end)
            self.buffer[:, self.num_tokens : end] = latent
        self.num_tokens = end
        self.is_initialized = True
        return self.buffer[:, :end]

    def crop(self, max_length: int) -> None:
        raise ValueError(
            f"crop({max_length}) is not possible: the KDA layers of this cache cannot go back"
        )

    def _reserved(self, latent: Tensor, num_tokens: int) -> Tensor:
        """A buffer for `num_tokens`, with the present content."""
        buffer = self.buffer
        if buffer is not None and buffer.shape[1] >= num_tokens:
            # what inference_mode made can't be written to outside it
            if not buffer.is_inference() or torch.is_inference_mode_enabled():
                return buffer
        capacity = -(-num_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        grown = latent.new_empty(latent.shape[0], capacity, latent.shape[2])
        if self.buffer is not None:
            grown[:, : self.num_tokens] = self.buffer[:, : self.num_tokens]
        return grown


class KimiLinearCache(Cache):
    """Cache of a Kimi Linear model, one layer of the fitting kind per decoder layer.

    Args:
        config: A `KimiLinearConfig`; only its `layer_types` are read.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(layers=_layers_for(config))

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, by layer kind: "linear_attention" (fixed), "full_attention" (growing)."""
        total = {"linear_attention": 0, "full_attention": 0}
        for layer in self.layers:
            kind = "linear_attention" if isinstance(layer, KDALayerCache) else "full_attention"
            total[kind] += layer.memory_bytes()
        return total


def prepare_cache(cache: Cache | None, config: PreTrainedConfig) -> Cache:
    """A cache with layers of ours: a new one for None, the given one if it is ours or still empty.

    Raises:
        ValueError: If another cache already holds tokens, or is of a kind that our layers cannot
            stand in for.
    """
    if cache is None:
        return KimiLinearCache(config)
    layers = getattr(cache, "layers", [])
    if layers and all(hasattr(layer, "memory_bytes") for layer in layers):
        if len(layers) != config.num_hidden_layers:
            raise ValueError(
                f"past_key_values has {len(layers)} layers, which is not allowed: it must have "
                f"num_hidden_layers={config.num_hidden_layers}"
            )
        return cache
    name = type(cache).__name__
    if name != "DynamicCache" or getattr(cache, "offloading", False):
        raise ValueError(
            f"past_key_values={name} is not supported: it must be a KimiLinearCache, "
            "a DynamicCache or None"
        )
    if any(getattr(layer, "is_initialized", False) or _has_state(layer) for layer in layers):
        raise ValueError(
            f"past_key_values={name} holds tokens that this model did not write: it must be empty"
        )
    cache.layers, cache.layer_class_to_replicate = _layers_for(config), None
    return cache


def _layers_for(config: PreTrainedConfig) -> list[_LayerCache]:
    kinds = {"linear_attention": KDALayerCache, "full_attention": LatentLayerCache}
    return [kinds[kind]() for kind in config.layer_types]


def _has_state(layer: object) -> bool:
    flags = getattr(layer, "has_previous_state", False)
    return any(flags.values()) if isinstance(flags, dict) else bool(flags)


__all__ = ["KDALayerCache", "KimiLinearCache", "LatentLayerCache", "prepare_cache"]
