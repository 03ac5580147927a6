"""Between the released checkpoints' names and the model's: only the routed experts differ.

A checkpoint stores w1 (gate), w3 (up) and w2 (down) of each expert; the model holds them fused, as
`gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]. Transformers applies the mapping on load and
reverses it on save. Everything else carries the checkpoint's name in the model too.

Shapes: D hidden size, H heads, I expert width, E experts, W convolution width.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)
from transformers.modeling_utils import PreTrainedModel

HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000


def register_conversion(class_name: str) -> None:
    """Register the mapping for models of class `class_name`, a name Transformers has not."""
    # The patterns are regular expressions on load and, the other way round, on save: an unescaped
    # dot would also match the underscore of `shared_experts.down_proj`.
    register_checkpoint_conversion_mapping(
        class_name,
        [
            WeightConverter(
                source_patterns=[r"\.experts.*.w1.weight", r"\.experts.*.w3.weight"],
                target_patterns=r"\.experts\.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                source_patterns=r"\.experts.*.w2.weight",
                target_patterns=r"\.experts\.down_proj",
                operations=[MergeModulelist(dim=0)],
            ),
        ],
        overwrite=True,
    )


def other_spellings() -> list[WeightRenaming]:
    """For loading only: Transformers' own class saves dense MLPs under the experts' name."""
    return [
        WeightRenaming(
            source_patterns=rf"\.block_sparse_moe\.{part}_proj\.",
            target_patterns=rf".mlp.{part}_proj.",
        )
        for part in ("gate", "up", "down")
    ]


def official_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a checkpoint of `model` has, in the released layout.

    Args:
        model: The model; its tensors may be on the meta device.

    Returns:
        Shape by checkpoint name, for parameters and saved buffers; tied weights once.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        for official, shape in _unfused(name, tuple(tensor.shape)):
            shapes[official] = shape
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _unfused(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    prefix, dot, last = name.rpartition(".")
    if last == "gate_up_proj" and prefix.endswith("experts"):
        for expert in range(shape[0]):
            yield f"{prefix}.{expert}.w1.weight", (shape[1] // 2, shape[2])
            yield f"{prefix}.{expert}.w3.weight", (shape[1] // 2, shape[2])
    elif last == "down_proj" and prefix.endswith("experts"):
        for expert in range(shape[0]):
            yield f"{prefix}.{expert}.w2.weight", shape[1:]
    else:
        yield name, shape


def check_checkpoint(
    files: list[str], model: PreTrainedModel, *, optional: tuple[str, ...] = ()
) -> None:
    """Compare safetensors files with the model before anything is loaded.

    Args:
        files: Paths of all shards.
        model: The model, possibly on the meta device.
        optional: Prefixes of model names that a checkpoint may lack (new task heads).

    Raises:
        ValueError: If a file is missing or truncated, a tensor is missing, or has another shape;
            the message names file and tensor.
    """
    expected = official_shapes(model)
    seen = set()
    for path in files:
        for name, shape in read_header(path).items():
            own = _own_name(name, expected, model.base_model_prefix)
            if own is not None and shape != expected[own]:
                raise ValueError(
                    f"{path}: tensor {name} has shape {list(shape)}, "
                    f"the model needs {list(expected[own])}"
                )
            seen.add(own)
    missing = [name for name in expected if name not in seen and not name.startswith(optional)]
    if missing:
        shown = ", ".join(missing[:5]) + (
            f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        )
        where = (
            files[0] if len(files) == 1 else f"{len(files)} shards in {os.path.dirname(files[0])}"
        )
        raise ValueError(f"{where}: {len(missing)} tensors of the model are missing: {shown}")


def _own_name(name: str, expected: dict[str, Any], base_prefix: str) -> str | None:
    """The model's name for checkpoint tensor `name`, with or without the backbone's prefix."""
    name = re.sub(r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj.", name)
    for candidate in (name, f"{base_prefix}.{name}", name.removeprefix(f"{base_prefix}.")):
        if candidate in expected:
            return candidate
    return None


def read_header(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name from a safetensors file's header, after checking that the file holds all its
    data.

    Raises:
        ValueError: If the file is missing, is no safetensors file, or ends too early (naming the
            first tensor cut).
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: the shard is missing")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(HEADER_LENGTH_BYTES), "little")
        if size < HEADER_LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - HEADER_LENGTH_BYTES):
            raise ValueError(
                f"{path}: not a whole safetensors file ({size} bytes, header of {length} bytes)"
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: the safetensors header cannot be read ({error})") from error
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][1]):
        end = HEADER_LENGTH_BYTES + length + entry["data_offsets"][1]
        if end > size:
            raise ValueError(f"{path}: truncated at {size} bytes, tensor {name} ends at byte {end}")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


__all__ = [
    "check_checkpoint",
    "official_shapes",
    "other_spellings",
    "read_header",
    "register_conversion",
]
