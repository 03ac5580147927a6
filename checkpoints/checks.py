"""Whether a checkpoint fits a model, before anything is loaded."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

from kimi_linear.checkpoints.experts import ExpertMatrix, split_names
from kimi_linear.checkpoints.files import read_blocks
from kimi_linear.checkpoints.names import official_shapes, own_name, some

# What stands beside a quantised weight, whose numbers are not the model's.
SCALES = ("_scale", "_scale_inv")


class CheckpointError(ValueError, RuntimeError):
    """Weights that do not fit the model. Transformers raises RuntimeError there."""


def check_checkpoint(
    files: list[str],
    model: PreTrainedModel,
    *,
    optional: tuple[str, ...] = (),
    may_lack: bool = False,
    matrices: Iterable[Any] = (),
) -> None:
    """Compare safetensors files with the model before anything is loaded.

    Args:
        files: Paths of all shards.
        model: The model, possibly on the meta device.
        optional: Prefixes of model names that a checkpoint may lack (new task heads).
        may_lack: Whether tensors may be missing; those that are there are still checked.
        matrices: Those that are quantised (`packed_parts.py`), which have been checked.

    Raises:
        CheckpointError: If a tensor is missing, has another shape, or is no floating-point one; the
            message names file and tensor.
        ValueError: If a file is missing or truncated.
    """
    expected = official_shapes(model)
    fused = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = model.base_model_prefix
    seen: set[str] = set()
    names: list[str] = []
    taken: set[str] = set()
    for matrix in matrices:
        taken.update(matrix.names())
        names.append(f"{matrix.stem}.weight")
        seen.add(own_name(names[-1], expected, prefix) or "")
    for path in files:
        blocks = read_blocks(path)
        for name, block in blocks.items():
            shape = block.shape
            if name in taken:
                continue
            names.append(name)
            own = own_name(name, expected, prefix) or own_name(name, fused, prefix)
            if own is None:
                check_expert(path, name, fused, prefix)
                continue
            if not block.dtype.startswith(("F", "BF")):
                raise CheckpointError(
                    f"{path}: tensor {name} is in {block.dtype}, the model needs floating point"
                )
            if any(f"{name}{end}" in blocks for end in SCALES):
                raise CheckpointError(
                    f"{path}: tensor {name} is in {block.dtype} with a scale, which needs a "
                    "quantization_config in config.json that says what it stands for"
                )
            needed = expected.get(own) or fused[own]
            if shape != needed:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(shape)}, the model needs {list(needed)}"
                )
            seen.update(official for official, _ in split_names(own, shape))
    if not any(name.startswith(f"{prefix}.") for name in names):
        # a checkpoint of the backbone alone: whatever head the model has is new
        optional += tuple(name for name in expected if not name.startswith(f"{prefix}."))
    missing = [name for name in expected if name not in seen and not name.startswith(optional)]
    if missing and not may_lack:
        where = (
            files[0] if len(files) == 1 else f"{len(files)} shards in {os.path.dirname(files[0])}"
        )
        raise CheckpointError(
            f"{where}: {len(missing)} tensors of the model are missing: {some(missing)}"
        )


def check_expert(path: str, name: str, fused: dict[str, Any], base_prefix: str) -> None:
    """An expert that the model has no place for, in a layer where it has experts, is an error."""
    matrix = ExpertMatrix.from_name(name)
    own = matrix and own_name(matrix.fused_name, fused, base_prefix)
    if own:
        raise CheckpointError(
            f"{path}: tensor {name} has no place: num_experts={fused[own][0]} in the model"
        )


def check_inside(folder: str, files: Iterable[str]) -> None:
    """Check that the files that an index names are in the folder; links may lead out of it.
    Nothing where there is no such folder, as for a repository.

    Raises:
        ValueError: One is not.
    """
    root = os.path.abspath(folder)
    for file in files if os.path.isdir(folder) else ():
        if not Path(os.path.abspath(file)).is_relative_to(root):
            raise ValueError(f"{folder}: the index names {file}, which is outside of this folder")


def check_finite(files: Iterable[str]) -> None:
    """Check that no tensor holds NaN or Inf, by reading them all.

    Args:
        files: Paths of safetensors files.

    Raises:
        ValueError: One does; the message names file and tensor.
    """
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                wide = tensor.float() if tensor.is_floating_point() else tensor
                if not wide.isfinite().all():
                    raise ValueError(f"{path}: tensor {name} holds NaN or Inf")
