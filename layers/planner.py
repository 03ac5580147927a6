"""How a call becomes a plan: what its padding, packing and cache mean for the layers.

Shapes: B batch, T tokens of this call, S tokens of cache and call, D hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from kimi_linear.cache.calls import cache_for_call
from kimi_linear.cache.pieces import KDAPieces, Piece, plan_pieces, read_tokens
from kimi_linear.cache.static import is_static_call, without_room
from kimi_linear.inputs.checks import check_columns, unless_all_real
from kimi_linear.inputs.layout import (
    SequenceLayout,
    check_attention_mask,
    sequence_layout,
    traced_layout,
)
from kimi_linear.layers.plan import ForwardPlan
from kimi_linear.layers.texts import texts_plan
from kimi_linear.ops.runtime import is_exporting
from kimi_linear.upstream.interfaces import (
    attention_backend,
    create_causal_mask,
    is_flash,
    packed_sequence_mask_function,
)

# Without gradients, a first call of up to this many tokens goes to "sdpa", a longer one to
# `ops/latent_attention`.
BACKEND_TOKENS = 1024
# Packed sequences of this many tokens on average are attended to one by one: a call for each.
SEQUENCE_TOKENS = 128


class Planner:
    """Plans the calls of a process that has all of their tokens; see `plan`.

    `parallel/context.py` has one for processes that divide the tokens of a row.
    """

    has_all_tokens = True

    def own(self, source: Tensor) -> Tensor:
        """The part of ids or embeddings [B, T, ...] that this process reads."""
        return source

    def own_labels(
        self, labels: Tensor, loss_kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Labels [B, T] and loss arguments of this process' tokens."""
        return labels, loss_kwargs

    def total(self, x: Tensor) -> Tensor:
        """The sum of the processes' tensors."""
        return x

    def plan(
        self,
        model: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        use_cache: bool | None,
        **boundaries: Tensor | None,
    ) -> ForwardPlan:
        """Settle what a call's padding, packing and cache mean for its layers.

        Args:
            model: The backbone; its configuration and mode count.
            hidden_states: [B, T, D], the embeddings.
            attention_mask: [B, S], non-zero at real tokens, cached ones included.
            cache, use_cache: As the backbone's.
            **boundaries: `position_ids`, `seq_idx`, `cu_seq_lens`, see `sequence_layout`.

        Raises:
            ValueError: If they contradict each other; the message names the argument.
        """
        if isinstance(cache, list):
            return texts_plan(model, hidden_states, attention_mask, cache, **boundaries)
        B, T = hidden_states.shape[:2]
        device = hidden_states.device
        if attention_mask is not None:
            check_attention_mask(attention_mask, B, T)
        if torch.compiler.is_compiling() and is_static_call(cache):
            return static_plan(cache, attention_mask, hidden_states)
        attention_mask = without_room(cache, attention_mask, T)
        mask = unless_all_real(attention_mask)
        layout = sequence_layout(B, T, attention_mask=mask, **boundaries, device=device)
        cache = cache_for_call(model, layout, cache, use_cache, B)
        past = 0 if cache is None else cache.get_seq_length()
        check_columns(attention_mask, past, T)
        if is_static_call(cache):
            cache.note_padding(attention_mask, mask)
            return static_plan(cache, mask, hidden_states)
        real = None if mask is None else mask.to(device) != 0
        route = _route(model.config, layout, cache, past, T)
        plan = ForwardPlan(
            layout,
            cache,
            route,
            _pieces(model, cache, layout, mask, (B, T), device),
            mask=_backend_mask(route, hidden_states, model.config, layout, mask, cache),
            real_tokens=real,
            own_real=None if real is None or layout.is_plain else real[:, -T:],
        )
        if cache is not None:
            cache.note_padding(attention_mask, mask)
        return plan


def _route(config: Any, layout: SequenceLayout, cache: Cache | None, past: int, T: int) -> Any:
    """How MLA layers attend, see `ForwardPlan`.

    A backend of Transformers' attention interface needs nothing here: "backend" asks for it by
    name; only "sdpa" leaves long texts and packed ones to other routes. A kernel for long texts
    and cached ones belongs in `ops/latent_attention/expanded.py`. What can be neither gets a route
    of its own: here, and a `case` in `layers/latent_attention.py`.
    """
    backend = attention_backend(config)
    # where "sdpa" would need memory that grows with the square of the context
    is_long = T > BACKEND_TOKENS and not layout.is_packed and not torch.is_grad_enabled()
    if past or (is_long and backend == "sdpa" and not is_exporting()):
        return "latents"
    if layout.is_packed and backend == "sdpa" and not torch.compiler.is_compiling():
        assert layout.cu_seqlens is not None
        # in rows, a mask would grow with the square of their length
        if layout.num_places >= (layout.cu_seqlens.numel() - 1) * SEQUENCE_TOKENS:
            return "sequences"
    is_in_line = is_flash(config) and layout.cu_seqlens is not None and cache is None
    return "flash" if is_in_line else "backend"


def _backend_mask(
    route: str,
    hidden_states: Tensor,
    config: Any,
    layout: SequenceLayout,
    mask: Tensor | None,
    cache: Cache | None,
) -> Any:
    """The mask that the attention backend wants; None if it needs none or is not asked."""
    if route != "backend" or "full_attention" not in config.layer_types:
        return None
    if is_flash(config) and cache is None and layout.order is None:
        return None
    inside = packed_sequence_mask_function(layout.sequence_ids) if layout.is_packed else None
    # the cache by its place: Transformers renamed it
    return create_causal_mask(config, hidden_states, mask, cache, and_mask_function=inside)


def _pieces(
    model: Any,
    cache: Cache | None,
    layout: SequenceLayout,
    mask: Tensor | None,
    shape: tuple[int, int],
    device: torch.device,
) -> KDAPieces:
    """How KDA layers read the call; their caches all hold the same tokens."""
    layers: list[Any] = [] if cache is None else cache.layers
    layers = [layer for layer in layers if layer.kind == "linear_attention"]
    size = read_tokens(model, shape, device)
    if not layers:
        return plan_pieces(shape, layout, size)
    # in a pipeline, another process has the first ones
    layer = next((layer for layer in layers if layer.num_rows is not None), layers[0])
    return plan_pieces(
        shape,
        layout,
        size,
        rollback_tokens=layer.rollback.tokens,
        num_logged=layer.rollback.num_logged,
        is_stale=layer.is_stale,
        attention_mask=mask,
        device=device,
    )


def static_plan(cache: Any, attention_mask: Tensor | None, hidden_states: Tensor) -> ForwardPlan:
    """The plan of a compiled step, whose shapes are those of all steps.

    Args:
        cache: A `KimiLinearStaticCache`, with tokens.
        attention_mask: [B, S or fewer], non-zero at real tokens up to the last of this call.
        hidden_states: [B, T, D], the embeddings.
    """
    B, T = hidden_states.shape[:2]
    device = hidden_states.device
    columns = cache.layers[0].length.to(device) + torch.arange(T, device=device)
    seen = (torch.arange(cache.room, device=device) <= columns[:, None]).expand(B, -1, -1)
    layout, own = SequenceLayout(), None
    if attention_mask is not None:
        real = attention_mask.to(device) != 0
        own = real.index_select(1, columns)
        real = F.pad(real, (0, cache.room - real.shape[1]))
        seen, layout = seen & real[:, None], traced_layout(own)
    pieces = KDAPieces((Piece(0, T, layout),))
    return ForwardPlan(layout, cache, "latents", pieces, own_real=own, seen=seen)
