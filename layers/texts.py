"""Calls that read texts of different lengths, each into a cache of its own.

The texts' next tokens lie end to end in one row; the caches come as a list, one for each sequence.
Nothing is padded, and a text goes on from where it is: behind a prefix, or behind the pieces read
before.

Shapes: T tokens of the call, N texts, D hidden size, L + P width of a latent.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.cache.hybrid import check_one_text, prepare_cache
from kimi_linear.cache.pieces import KDAPieces
from kimi_linear.cache.state import KDAState
from kimi_linear.inputs.layout import SequenceLayout, sequence_ends
from kimi_linear.layers.plan import ForwardPlan
from kimi_linear.ops.fla.backend import prepare_fla_layout


@dataclass(frozen=True)
class TextsPlan(ForwardPlan):
    """The plan of such a call; `cache` is the list.

    Attributes:
        num_tokens: Of each text in this call.
    """

    num_tokens: tuple[int, ...] = ()

    def begin_call(self) -> None:
        for cache in self.cache:
            cache.begin_call()

    def end_call(self, modules: list[nn.Module]) -> None:
        for cache in self.cache:
            cache.end_call(modules)

    def read_kda(self, attention: Any, hidden_states: Tensor) -> Tensor:
        """Have a KDA layer read [1, T, D] from the states of all texts."""
        layers = [cache.layers[attention.layer_idx] for cache in self.cache]
        for layer in layers:
            layer.settle()
        before = KDAState.joined([layer.state for layer in layers])
        x, layout = hidden_states, self.layout
        if len(set(self.num_tokens)) == 1:  # as rows, which needs less than their boundaries
            x, layout = x.unflatten(1, (len(layers), -1)).squeeze(0), SequenceLayout()
        out, after, _ = attention.attend(x, layout, before)
        for layer, state, num_tokens in zip(layers, after.rows(), self.num_tokens, strict=True):
            layer.hold(state, num_tokens)
        return out.reshape(hidden_states.shape)

    def keep_latents(self, layer_idx: int, latent: Tensor) -> list[Any]:
        """Cache each text's latents of [1, T, L + P]; return the segments of each text."""
        layers = [cache.layers[layer_idx] for cache in self.cache]
        parts = latent.split(self.num_tokens, dim=1)
        return [
            layer.update(part) if part.shape[1] else layer.segments()
            for layer, part in zip(layers, parts, strict=True)
        ]

    @property
    def ends(self) -> list[int]:
        return [0, *itertools.accumulate(self.num_tokens)]


def texts_plan(
    model: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    caches: list[Any],
    *,
    cu_seq_lens: Tensor | None = None,
    **others: Tensor | None,
) -> TextsPlan:
    """The plan of a call with a cache for each sequence.

    Args:
        model: The backbone.
        hidden_states: [1, T, D].
        attention_mask: None: nothing is padded.
        caches: N, each of one text that has no padding and cannot be cropped. They are written to.
        cu_seq_lens: [N + 1], where the texts' tokens end; a text may have none.
        **others: None: `cu_seq_lens` says all.

    Raises:
        ValueError: If something else is given.
    """
    given = [
        name for name, x in {"attention_mask": attention_mask, **others}.items() if x is not None
    ]
    if given or cu_seq_lens is None or hidden_states.shape[0] != 1:
        raise ValueError(
            "a list of caches needs one row of tokens and cu_seq_lens_q, which says where each "
            f"cache's end, and no {' or '.join(given) or 'other boundaries'}"
        )
    if len({id(cache) for cache in caches}) < len(caches):
        raise ValueError(
            "cache has the same cache twice, which is not allowed: each text needs one"
        )
    own = [prepare_cache(cache, model.config) for cache in caches]
    for i, cache in enumerate(own):
        _check_text(cache, f"cache[{i}]")
    num_places, device = hidden_states.shape[1], hidden_states.device
    ends = sequence_ends(cu_seq_lens, num_places, len(own)).cpu()
    with torch.inference_mode(False):  # with a version, by which FLA's form of it is found again
        own_ends = ends.to(device, torch.int32, non_blocking=True)
    if device.type != "cpu":  # before a layer would wait for what is launched
        prepare_fla_layout(own_ends, ends)
    return TextsPlan(
        SequenceLayout(cu_seqlens=own_ends, num_places=num_places),
        own,
        "texts" if any(cache.get_seq_length() for cache in own) else "sequences",
        KDAPieces(()),
        num_tokens=tuple(ends.diff().tolist()),
    )


def _check_text(cache: Any, name: str) -> None:
    """ValueError unless it is of one text, which need not go back."""
    check_one_text(cache, name)
    kept = max((x.rollback.tokens for x in cache.layers if x.kind == "linear_attention"), default=0)
    if kept:
        raise ValueError(
            f"{name} has rollback_tokens={kept}, which is not allowed: it must be 0, "
            "KimiLinearCache(config, rollback_tokens=0)"
        )
