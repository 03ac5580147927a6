"""What the two kinds of cache layers share."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class LayerCache(CacheLayerMixin):
    """What both kinds share: they count tokens and select rows of their tensors.

    Attributes:
        kind: Its entry of `config.layer_types`.
        num_tokens: S, padding included.
        has_padding: Whether some of them may be padding.
    """

    is_sliding = False
    supports_early_init = False
    kind = ""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0
        self.has_padding = False

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.num_tokens = 0
        self.has_padding = False
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def check_crop(self, tokens_to_remove: int) -> int:
        """Tokens left by `crop(tokens_to_remove)`; ValueError if it is not possible."""
        tokens_to_remove = int(tokens_to_remove)  # Transformers 5.17 hands over a tensor
        if tokens_to_remove > 0:
            return min(tokens_to_remove, self.num_tokens)
        left = self.num_tokens + tokens_to_remove
        if left < 0:
            raise ValueError(
                f"crop({tokens_to_remove}) is not possible: the cache holds {self.num_tokens} "
                "tokens"
            )
        return left

    @property
    def num_rows(self) -> int | None:
        """B, or None while empty."""
        raise NotImplementedError

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the tensors that this layer holds, by purpose."""
        raise NotImplementedError

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace each tensor by what `function` makes of it."""
        raise NotImplementedError


def may_write(x: Tensor) -> bool:
    """Whether `x` may be written in place: it is in no graph, and not made by inference_mode."""
    return not x.requires_grad and (not x.is_inference() or torch.is_inference_mode_enabled())
