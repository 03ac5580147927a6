"""A cache of fixed size whose decode steps `torch.compile` can take as one graph.

`generate(cache_implementation="static", compile_config=CompileConfig(...))` asks for it where no
CUDA graph of ours decodes: on a CPU, or with `decode_backend = "eager"`. What changes from step to
step is then in tensors of one address and shape: states and latents, how many tokens they hold, and
a mask with a column for each token that there is room for.

Shapes: B batch, T tokens of this call, S tokens that there is room for, R latent width.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import StaticCache

from kimi_linear.cache.hybrid import KimiLinearCache
from kimi_linear.cache.kda import KDALayerCache
from kimi_linear.cache.latents import BLOCK_TOKENS, LatentLayerCache
from kimi_linear.cache.state import KDAState
from kimi_linear.upstream.interfaces import attention_backend


class _CountsInTensor:
    """Mixin: `num_tokens` is the number in a tensor, so that no graph depends on it.

    Attributes:
        length: [1] int64.
        is_dense: Whether calls without a compiler too see all of the room.
    """

    is_compileable = True
    is_dense = False
    length: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.length)

    @num_tokens.setter
    def num_tokens(self, value: int) -> None:
        self.length = torch.full((1,), value, device=getattr(self, "place", None))


def _room(max_tokens: int) -> int:
    """Tokens that the buffer for `max_tokens` has room for."""
    return -(-max_tokens // BLOCK_TOKENS) * BLOCK_TOKENS


class CompiledKDALayer(_CountsInTensor, KDALayerCache):
    """State of one KDA layer, without what `crop` needs."""

    def fork(self) -> "CompiledKDALayer":
        other = super().fork()
        other.length = self.length.clone()  # steps count in place
        return other

    def _writable_state(self, num_rows: int) -> Tensor | None:
        """The recurrent state's tensor, which a compiled step always writes over."""
        if torch.compiler.is_compiling():
            return self.state.recurrent
        return super()._writable_state(num_rows)

    def _take(self, state: KDAState, logged: Tensor) -> None:
        self.place = logged.device
        if not torch.compiler.is_compiling():
            super()._take(state, logged)
            return
        for kept, new in zip(self.state.tensors(), state.tensors(), strict=True):
            if kept is not new:
                kept.copy_(new)

    def _count(self, num_tokens: int) -> None:
        if torch.compiler.is_compiling():
            self.length.add_(num_tokens)
        else:
            super()._count(num_tokens)


class CompiledLatentLayer(_CountsInTensor, LatentLayerCache):
    """Latents of one MLA layer in a buffer that does not grow."""

    def get_max_length(self) -> int:
        return _room(self.reserve_tokens)

    get_max_cache_shape = get_max_length  # its older name

    def fork(self) -> "CompiledLatentLayer":
        """An independent copy that continues from here; it shares no memory."""
        other = copy.copy(self)
        other._map(Tensor.clone)
        other.length = self.length.clone()
        return other

    def _select(self, function: Callable[[Tensor], Tensor], num_rows: int) -> None:
        if self.tail is not None:
            self.tail, self._num_rows = function(self.tail), num_rows

    def update(self, latent: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Append [B, T, R] and return all segments; to a compiler, all of the buffer [B, S, R]."""
        self.place = latent.device
        if not (self.is_dense or torch.compiler.is_compiling()):
            return super().update(latent)
        if self.tail is None:
            B, _, R = latent.shape
            self.tail, self.num_tokens = latent.new_zeros(B, self.get_max_length(), R), 0
            self._num_rows, self.is_initialized = B, True
        columns = self.length + torch.arange(latent.shape[1], device=latent.device)
        self.tail.index_copy_(1, columns, latent.to(self.tail.dtype))
        self.length.add_(latent.shape[1])
        return [self.tail]


class KimiLinearStaticCache(KimiLinearCache, StaticCache):
    """A `KimiLinearCache` that allocates all of its memory at the start.

    Args:
        config: A `KimiLinearConfig`.
        max_tokens: Tokens that there is room for.
        rollback_tokens, offload: As of `KimiLinearCache`.
        is_compileable: Whether `generate()` compiles the steps; then nothing can be taken back.
    """

    def __init__(
        self,
        config: Any,
        max_tokens: int,
        *,
        rollback_tokens: int = 0,
        offload: bool = False,
        is_compileable: bool = False,
    ) -> None:
        super().__init__(
            config,
            rollback_tokens=rollback_tokens,
            reserve_tokens=max_tokens,
            offload=offload,
        )
        self.room = _room(max_tokens)  # S
        # attention weights are all returned by "eager" attention: let them have one shape
        self.is_dense = is_compileable and attention_backend(config) == "eager"
        if is_compileable:
            self.layers: list[Any] = [
                CompiledKDALayer(0)
                if kind == "linear_attention"
                else CompiledLatentLayer(max_tokens)
                for kind in config.layer_types
            ]
            for layer in self.layers:
                layer.is_dense = self.is_dense

    def fit_step(
        self, inputs: dict[str, Any], attention_mask: Tensor | None, *, is_first: bool
    ) -> None:
        """Give a step of `generate()` its mask, whose shape all steps but the first have; of
        Transformers, it would have four dimensions for a compiler.

        Raises:
            ValueError: If there is no room for the step's tokens.
        """
        if attention_mask is not None and not is_first:
            attention_mask = self.with_room(attention_mask)
        inputs["attention_mask"] = attention_mask
        ids = inputs.get("input_ids")
        source = inputs["inputs_embeds"] if ids is None else ids
        self.check_room(self.get_seq_length() + source.shape[1])

    def with_room(self, attention_mask: Tensor) -> Tensor:
        """A mask of the tokens up to now [B, n] in the shape that all steps have: [B, S]."""
        self.check_room(attention_mask.shape[1])
        return F.pad(attention_mask, (0, self.room - attention_mask.shape[1]))

    def check_room(self, num_tokens: int) -> None:
        """ValueError if there are more tokens than there is room for."""
        if num_tokens > self.room:
            raise ValueError(
                f"the text has {num_tokens} tokens, which is not allowed: the static cache has "
                f"room for {self.room}, as the call that made it needed"
            )

    @property
    def is_static_call(self) -> bool:
        """Whether a call is planned by `static_plan`: a compiler is at work that can take it,
        since states and latents are there, or all calls are."""
        if torch.compiler.is_compiling() and self.is_compileable:
            return all(layer.is_initialized for layer in self.layers)
        return self.is_dense


def is_compileable(cache: Any) -> bool:
    """Whether `generate()` compiles the steps behind this cache."""
    return isinstance(cache, KimiLinearStaticCache) and cache.is_compileable


def is_static_call(cache: Any) -> bool:
    """Whether a call behind this cache is planned by `static_plan`."""
    return isinstance(cache, KimiLinearStaticCache) and cache.is_static_call


def without_room(cache: Any, attention_mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """The mask without the columns that `with_room` added, for a call that no compiler takes."""
    if attention_mask is None or not is_compileable(cache):
        return attention_mask
    if attention_mask.shape[1] != cache.room:
        return attention_mask
    return attention_mask[:, : cache.get_seq_length() + num_tokens]
