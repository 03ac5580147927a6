"""A cache of fixed size whose decode steps `torch.compile` can take as one graph.

`generate(cache_implementation="static", compile_config=CompileConfig(...))` asks for it where no
CUDA graph of ours decodes: on a CPU, or with `decode_backend = "eager"`. What changes from step to
step is then in tensors of one address and shape: states and latents, how many tokens they hold, and
a mask with a column for each token that there is room for.

Shapes: B batch, T tokens of this call, S tokens that there is room for, R latent width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import StaticCache

from .cache_kimi_linear import (
    BLOCK_TOKENS,
    KDALayerCache,
    KimiLinearCache,
    LatentLayerCache,
    States,
)
from .rollback import KDAPlan, KDARun
from .sequence_layout import SequenceLayout, traced_layout


class _CountsInTensor:
    """Mixin: `num_tokens` is the number in a tensor, so that no graph depends on it."""

    is_compileable = True
    length: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.length)

    @num_tokens.setter
    def num_tokens(self, value: int) -> None:
        self.length = torch.full((1,), value, device=getattr(self, "place", None))


class CompiledKDALayer(_CountsInTensor, KDALayerCache):
    """State of one KDA layer, without what `crop` needs."""

    def writable_state(self, batch_size: int) -> Tensor | None:
        """The recurrent state's tensor, which a compiled step always writes over."""
        if torch.compiler.is_compiling():
            return self.recurrent_state
        return super().writable_state(batch_size)

    def update(  # type: ignore[override]
        self, states: States, hidden_states: Tensor, plan: KDAPlan, logged: Tensor
    ) -> None:
        """Take the states after a call, see `KDALayerCache.update`."""
        self.place = hidden_states.device
        if not torch.compiler.is_compiling():
            super().update(states, hidden_states, plan, logged)
            return
        for kept, new in zip((self.conv_state, self.recurrent_state), states, strict=True):
            assert kept is not None and new is not None
            if kept is not new:
                kept.copy_(new)
        self.length.add_(hidden_states.shape[1])


class CompiledLatentLayer(_CountsInTensor, LatentLayerCache):
    """Latents of one MLA layer in a buffer that does not grow."""

    def update(self, latent: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Append [B, T, R] and return all segments; to a compiler, all of the buffer [B, S, R]."""
        self.place = latent.device
        if not torch.compiler.is_compiling():
            return super().update(latent)
        assert self.tail is not None
        columns = self.length + torch.arange(latent.shape[1], device=latent.device)
        self.tail.index_copy_(1, columns, latent.to(self.tail.dtype))
        self.length.add_(latent.shape[1])
        return [self.tail]


class KimiLinearStaticCache(KimiLinearCache, StaticCache):
    """A `KimiLinearCache` that has its room from the start.

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
        self.room = -(-max_tokens // BLOCK_TOKENS) * BLOCK_TOKENS  # S
        if is_compileable:
            self.layers: list[Any] = [
                CompiledKDALayer(0)
                if kind == "linear_attention"
                else CompiledLatentLayer(max_tokens)
                for kind in config.layer_types
            ]

    def with_room(self, attention_mask: Tensor) -> Tensor:
        """A mask of the tokens up to now [B, n] in the shape that all steps have: [B, S]."""
        return F.pad(attention_mask, (0, self.room - attention_mask.shape[1]))

    @property
    def is_step_compiled(self) -> bool:
        """Whether a compiler is at work that can take this call: states and latents are there."""
        if not (self.is_compileable and torch.compiler.is_compiling()):
            return False
        return all(layer.is_initialized for layer in self.layers)


def is_compiled_step(cache: Any) -> bool:
    """Whether a call behind this cache is a step that `compiled_inputs` plans."""
    return isinstance(cache, KimiLinearStaticCache) and cache.is_step_compiled


def without_room(cache: Any, attention_mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """The mask without the columns that `with_room` added, for a call that no compiler takes."""
    if attention_mask is None or not isinstance(cache, KimiLinearStaticCache):
        return attention_mask
    return attention_mask[:, : cache.get_seq_length() + num_tokens]


def compiled_inputs(
    cache: KimiLinearStaticCache, attention_mask: Tensor | None, hidden_states: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """The call's hidden states [B, T, D], zeros at padding, and what all layers are given.

    Args:
        cache: The cache, with tokens.
        attention_mask: [B, S], non-zero at real tokens up to the last of this call.
        hidden_states: [B, T, D], the embeddings.
    """
    B, T = hidden_states.shape[:2]
    device = hidden_states.device
    columns = cache.layers[0].length.to(device) + torch.arange(T, device=device)
    seen = (torch.arange(cache.room, device=device) <= columns[:, None]).expand(B, -1, -1)
    layout = SequenceLayout()
    if attention_mask is not None:
        real = attention_mask.to(device) != 0
        own = real.index_select(1, columns)
        seen, layout = seen & real[:, None], traced_layout(own)
        hidden_states = hidden_states.masked_fill(~own[..., None], 0)
    return hidden_states, {
        "layout": layout,
        "cache": cache,
        "attention_mask": seen,  # [B, T, S]
        "real_tokens": None,
        "by_blocks": True,
        "kda_plan": KDAPlan((KDARun(0, T, layout),)),
    }


__all__ = ["KimiLinearStaticCache", "compiled_inputs", "is_compiled_step", "without_room"]
