"""Checks of what a forward is given.

Shapes: B batch, T tokens of this call, S tokens of cache and call.
"""

from typing import Any

import torch
from torch import Tensor

from kimi_linear.upstream.arguments import BACKBONE_ARGUMENTS, LENGTH_ARGUMENTS, check_arguments


def check_backbone_arguments(
    model: Any, given: dict[str, Any], cu_seq_lens_q: Tensor | None
) -> None:
    """TypeError for arguments that the backbone does not know, ValueError for lengths of packed
    rows without their boundaries."""
    check_arguments(model, given, BACKBONE_ARGUMENTS)
    lengths = [name for name in LENGTH_ARGUMENTS if name in given]
    if lengths and cu_seq_lens_q is None:
        raise ValueError(
            f"{', '.join(lengths)} without cu_seq_lens_q is "
            "not allowed: cu_seq_lens_q says where packed sequences begin"
        )


def one_source(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """The ids or the embeddings of a call, whichever is given; ValueError for both or none."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    source: Any = input_ids if inputs_embeds is None else inputs_embeds
    check_source(source, "input_ids" if inputs_embeds is None else "inputs_embeds")
    return source


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
