"""Names of tensors: the model's, and a checkpoint's. Only the routed experts' differ."""

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from kimi_linear.checkpoints.experts import split_names
from kimi_linear.upstream.interfaces import WeightRenaming


def official_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a checkpoint of `model` has, in the released layout.

    Args:
        model: The model; its tensors may be on the meta device.

    Returns:
        Shape by checkpoint name, for parameters and saved buffers; tied weights once.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        for official, shape in split_names(name, tuple(tensor.shape)):
            shapes[official] = shape
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def own_name(name: str, expected: dict[str, Any], base_prefix: str) -> str | None:
    """The model's name for checkpoint tensor `name`, with or without the backbone's prefix."""
    name = re.sub(r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj.", name)
    for candidate in (name, f"{base_prefix}.{name}", name.removeprefix(f"{base_prefix}.")):
        if candidate in expected:
            return candidate
    return None


def other_spellings() -> list[WeightRenaming]:
    """For loading only: Transformers' own class saves dense MLPs under the experts' name."""
    return [
        WeightRenaming(
            source_patterns=rf"\.block_sparse_moe\.{part}_proj\.",
            target_patterns=rf".mlp.{part}_proj.",
        )
        for part in ("gate", "up", "down")
    ]


def some(names: Iterable[str]) -> str:
    """The first names of a list, for a message."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
