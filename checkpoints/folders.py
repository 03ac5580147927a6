"""The weights of a folder: which files they are, and whether they fit index and model."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kimi_linear.checkpoints.checks import check_checkpoint, check_inside
from kimi_linear.checkpoints.files import read_header
from kimi_linear.checkpoints.packed_config import stored_schemes
from kimi_linear.checkpoints.packed_files import read_packed
from kimi_linear.upstream.stored import entry_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def check_weights(folder: Path, model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Check every tensor against the index and against the model; only headers are read.

    Args:
        folder: The checkpoint.
        model: The model of its config, possibly on the meta device.

    Returns:
        Shape by name, from the files' headers; of quantised matrices that of the weights.

    Raises:
        ValueError: A file or tensor is missing, is not listed, is truncated or has another shape.
    """
    places = _weight_map(folder)
    names = [WEIGHTS] if places is None else sorted(set(places.values()))
    extra = {file.name for file in folder.glob("model*.safetensors")} - set(names)
    if extra:
        listed = WEIGHTS if places is None else f"the shards that {INDEX} lists"
        raise ValueError(f"{folder}: {', '.join(sorted(extra))} is left over; allowed: {listed}")
    found: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        header = read_header(str(folder / name))
        shapes |= header
        found |= dict.fromkeys(header, name)
    if places is not None:
        _check_index(folder / INDEX, places, found)
    paths, entry = [str(folder / name) for name in names], entry_of(model.config)
    matrices = [] if entry is None else read_packed(paths, model, stored_schemes(entry))[1]
    check_checkpoint(paths, model, matrices=matrices)
    for matrix in matrices:
        for name in matrix.names():
            del shapes[name]
        shapes[f"{matrix.stem}.weight"] = matrix.shape
    return shapes


def weight_files(folder: Path) -> list[str]:
    """Names of the files with weights, and of the index if there is one; ValueError if that is
    contradictory."""
    places = _weight_map(folder)
    return [WEIGHTS] if places is None else [INDEX, *sorted(set(places.values()))]


def _weight_map(folder: Path) -> dict[str, str] | None:
    """File by tensor, from the index; None where one file has all."""
    has_index = (folder / INDEX).is_file()
    if has_index == (folder / WEIGHTS).is_file():
        state = "both are there" if has_index else "both are missing"
        raise ValueError(f"{folder}: of {WEIGHTS} and {INDEX} one is needed, and {state}")
    if not has_index:
        return None
    places = read_object(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
        raise ValueError(f"{folder / INDEX}: weight_map must be an object with a file by tensor")
    absolute = sorted(name for name in set(places.values()) if os.path.isabs(name))
    if absolute:
        raise ValueError(f"{folder / INDEX} names {absolute[0]}; allowed: names in this folder")
    check_inside(str(folder), [str(folder / name) for name in places.values()])
    return places


def _check_index(index: Path, places: dict[str, str], found: dict[str, str]) -> None:
    """Each tensor is in the shard that the index says, and each tensor in a shard is listed."""
    for tensor in sorted(set(places) | set(found)):
        if places.get(tensor) != found.get(tensor):
            raise ValueError(
                f"{index}: tensor {tensor} is listed in {places.get(tensor, 'no shard')} and found "
                f"in {found.get(tensor, 'no shard')}"
            )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that must be there.

    Raises:
        ValueError: It is missing, is not JSON, or holds no object.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}; allowed: an object")
    return value
