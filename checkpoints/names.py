"""Between the released checkpoints' names and the model's: only the routed experts differ.

A checkpoint stores w1 (gate), w3 (up) and w2 (down) of each expert; the model holds them fused, as
`gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]. Everything else carries the checkpoint's name
in the model too. Transformers reverses the registered mapping on save. On load it could apply it,
but would hold the mapped files, all experts and their fused copies at once: `stored_tensors` reads
every expert's bytes straight to their place in the fused tensor instead.

Shapes: D hidden size, H heads, I expert width, E experts, W convolution width.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from kimi_linear.upstream.interfaces import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    register_checkpoint_conversion_mapping,
)
from kimi_linear.upstream.models import is_divided, is_quantized

HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
EXPERT_WEIGHT = re.compile(r"(.+\.experts)\.(\d+)\.(w[123])\.weight")
FUSED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}


class CheckpointError(ValueError, RuntimeError):
    """Weights that do not fit the model. Transformers raises RuntimeError there."""


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
    files: list[str],
    model: PreTrainedModel,
    *,
    optional: tuple[str, ...] = (),
    may_lack: bool = False,
) -> None:
    """Compare safetensors files with the model before anything is loaded.

    Args:
        files: Paths of all shards.
        model: The model, possibly on the meta device.
        optional: Prefixes of model names that a checkpoint may lack (new task heads).
        may_lack: Whether tensors may be missing; those that are there are still checked.

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
    for path in files:
        for name, block in _read_blocks(path).items():
            shape = block.shape
            names.append(name)
            own = _own_name(name, expected, prefix) or _own_name(name, fused, prefix)
            if own is None:
                _check_expert(path, name, fused, prefix)
                continue
            if not block.dtype.startswith(("F", "BF")):
                raise CheckpointError(
                    f"{path}: tensor {name} is in {block.dtype}, the model needs floating point"
                )
            needed = expected.get(own) or fused[own]
            if shape != needed:
                raise CheckpointError(
                    f"{path}: tensor {name} has shape {list(shape)}, the model needs {list(needed)}"
                )
            seen.update(official for official, _ in _unfused(own, shape))
    if not any(name.startswith(f"{prefix}.") for name in names):
        # a checkpoint of the backbone alone: whatever head the model has is new
        optional += tuple(name for name in expected if not name.startswith(f"{prefix}."))
    missing = [name for name in expected if name not in seen and not name.startswith(optional)]
    if missing and not may_lack:
        where = (
            files[0] if len(files) == 1 else f"{len(files)} shards in {os.path.dirname(files[0])}"
        )
        raise CheckpointError(
            f"{where}: {len(missing)} tensors of the model are missing: {_some(missing)}"
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


def _check_expert(path: str, name: str, fused: dict[str, Any], base_prefix: str) -> None:
    """An expert that the model has no place for, in a layer where it has experts, is an error."""
    match = EXPERT_WEIGHT.fullmatch(name)
    own = match and _own_name(f"{match[1]}.down_proj", fused, base_prefix)
    if own:
        raise CheckpointError(
            f"{path}: tensor {name} has no place: num_experts={fused[own][0]} in the model"
        )


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
        ValueError: If the file is missing, is no safetensors file to safetensors' own reader, or
            ends too early (naming the first tensor cut).
    """
    return {name: block.shape for name, block in _read_blocks(path).items()}


@dataclass(frozen=True)
class StoredBlock:
    """Where one tensor's bytes are: `size` of them from byte `start` of file `path`."""

    path: str
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


def _read_blocks(path: str) -> dict[str, StoredBlock]:
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
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            offset = HEADER_LENGTH_BYTES + length
            blocks = {name: _stored_block(path, offset, entry) for name, entry in entries}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: the safetensors header cannot be read ({error})") from error
    for name, block in blocks.items():
        end = block.start + block.size
        if end > size:
            raise ValueError(f"{path}: truncated at {size} bytes, tensor {name} ends at byte {end}")
    try:
        with safe_open(path, "pt"):
            return blocks  # without gaps and overlaps, and of whole numbers
    except SafetensorError as error:
        raise ValueError(f"{path}: the safetensors header cannot be read ({error})") from error


def _stored_block(path: str, offset: int, entry: dict[str, Any]) -> StoredBlock:
    start, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    dtype = DTYPES.get(entry["dtype"])
    block = StoredBlock(path, offset + start, end - start, entry["dtype"], shape)
    if dtype is not None and block.size != torch.Size(shape).numel() * dtype.itemsize:
        raise ValueError(f"{block.size} bytes for {list(shape)} in {block.dtype}")
    return block


class StoredTensor:
    """A tensor still in its files, read by `stored[...]`: blocks that stand end to end in memory.

    Nothing is mapped, so that reading costs the tensor's memory and no more.
    """

    def __init__(
        self, blocks: list[StoredBlock], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.blocks, self.shape, self.dtype = blocks, shape, dtype

    def __getitem__(self, index: Any) -> Tensor:
        """The tensor [`shape`] on the CPU in `dtype`, or the part of it that `index` picks.

        Raises:
            OSError: If a file cannot be read, or has become shorter.
        """
        out = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        flat, position = out.view(-1), 0
        with ExitStack() as stack:
            files: dict[str, Any] = {}
            for block in self.blocks:
                if block.path not in files:
                    files[block.path] = stack.enter_context(open(block.path, "rb", buffering=0))
                count = block.size // DTYPES[block.dtype].itemsize
                part = flat[position : position + count]
                if DTYPES[block.dtype] == self.dtype:
                    _read_into(files[block.path], block, part)
                else:
                    staged = torch.empty(count, dtype=DTYPES[block.dtype], device="cpu")
                    _read_into(files[block.path], block, staged)
                    part.copy_(staged)
                position += count
        return out[index]


def _read_into(file: Any, block: StoredBlock, target: Tensor) -> None:
    """Fill `target`, which is contiguous, with the block's bytes."""
    if block.size == 0:
        return
    view = target.view(torch.uint8).numpy().data
    file.seek(block.start)
    done = 0
    while done < block.size:
        count = file.readinto(view[done:])
        if not count:
            raise OSError(f"{block.path}: ends at byte {block.start + done}, inside a tensor")
        done += count


def stored_tensors(files: list[str], model: PreTrainedModel) -> dict[str, StoredTensor] | None:
    """The tensors of a checkpoint, still in their files, experts under their fused names.

    Args:
        files: Paths of all shards, safetensors.
        model: The model to load, possibly on the meta device; says the dtypes to read into.

    Returns:
        Tensors by name, for use as a state dict; experts of a layer that are not all there keep
        their own names. None if there is a dtype that this module does not read (8-bit weights).

    Raises:
        ValueError: As `read_header`.
    """
    blocks: dict[str, StoredBlock] = {}
    for path in files:
        blocks |= _read_blocks(path)
    if any(block.dtype not in DTYPES for block in blocks.values()):
        return None
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    tensors: dict[str, StoredTensor] = {}
    for name, parts, shape in [*_fused_experts(blocks), *((n, [n], None) for n in list(blocks))]:
        if parts[0] not in blocks:
            continue  # in a fused tensor
        found = [blocks.pop(part) for part in parts]
        own = _own_name(name, dtypes, model.base_model_prefix)
        dtype = dtypes[own] if own else DTYPES[found[0].dtype]
        tensors[name] = StoredTensor(found, shape or found[0].shape, dtype)
    return tensors


def _fused_experts(
    blocks: dict[str, StoredBlock],
) -> Iterator[tuple[str, list[str], tuple[int, ...]]]:
    """Name, parts in order of memory, and shape of each fused tensor whose parts are all there."""
    layers: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in blocks:
        if match := EXPERT_WEIGHT.fullmatch(name):
            layers[match[1]][match[3]][int(match[2])] = name
    for prefix, weights in layers.items():
        experts = range(len(set().union(*weights.values())))
        for fused, kinds in FUSED.items():
            parts = [weights[kind].get(expert, "") for expert in experts for kind in kinds]
            shapes = {blocks[part].shape for part in parts if part}
            if all(parts) and len(shapes) == 1 and len(*shapes) == 2:
                rows, columns = shapes.pop()
                yield f"{prefix}.{fused}", parts, (len(experts), rows * len(kinds), columns)


@torch.no_grad()
def write_weights(
    model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], *, strict: bool
) -> set[str]:
    """Copy tensors by checkpoint name into the model's own, see `load_weights` of the models."""
    if is_quantized(model) or is_divided(model):
        what = "quantised" if is_quantized(model) else "divided among processes"
        raise ValueError(f"the model's weights are {what}, which is not allowed in load_weights")
    state = model.state_dict(keep_vars=True)
    one_name: dict[int, str] = {}  # of tied weights
    for name, tensor in state.items():
        one_name.setdefault(id(tensor), name)
    loaded: set[str] = set()
    written: dict[str, str] = {}  # by which name
    for name, value in _pairs(weights):
        own, official, place = _place(name, state, model.base_model_prefix)
        _check_value(name, value, place)
        key = one_name[id(state[own])] if official == own else official
        if key not in written:
            place.copy_(value)
        elif not torch.equal(place, value.to(place)):
            raise ValueError(f"{name} differs from {written[key]}, the same weight of the model")
        written[key] = name
        if own == official:  # a fused tensor has all of its experts
            written |= dict.fromkeys((part for part, _ in _unfused(own, tuple(place.shape))), name)
        loaded.add(name)
    missing = [name for name in official_shapes(model) if name not in written] if strict else []
    if missing:
        raise ValueError(f"weights: {_some(missing)} did not come, which strict=True demands")
    return loaded


def _pairs(weights: Any) -> Iterator[tuple[str, Any]]:
    """The names and tensors that `weights` yields; ValueError for anything else."""
    allowed = "allowed: pairs of a name and a tensor, such as state_dict.items()"
    try:
        pairs = None if isinstance(weights, Mapping) else iter(weights)
    except TypeError:
        pairs = None
    if pairs is None:
        raise ValueError(f"weights is of type {type(weights).__name__}; {allowed}")
    for index, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str):
            parts = pair[:3] if isinstance(pair, tuple | list) else ()
            found = f"{pair!r:.80}" if isinstance(pair, str) else type(pair).__name__
            found += f" of {', '.join(type(part).__name__ for part in parts)}" * bool(parts)
            raise ValueError(f"weights: item {index} is {found}; {allowed}")
        yield pair[0], pair[1]


def _place(name: str, state: dict[str, Any], base_prefix: str) -> tuple[str, str, Any]:
    """The model's name for a checkpoint's tensor, the checkpoint's own, and where it goes."""
    own = _own_name(name, state, base_prefix)
    if own:
        return own, own, _checked(own, state[own])
    match = EXPERT_WEIGHT.fullmatch(name)
    for fused, kinds in FUSED.items() if match else ():
        assert match
        own = _own_name(f"{match[1]}.{fused}", state, base_prefix) if match[3] in kinds else None
        if own:
            experts, expert = _checked(own, state[own]), int(match[2])
            if expert >= len(experts):
                raise ValueError(f"{name} has no place: num_experts={len(experts)} in the model")
            part = experts[expert].chunk(len(kinds))[kinds.index(match[3])]
            return own, f"{own.removesuffix(fused)}{expert}.{match[3]}.weight", part
    raise ValueError(f"{name} is no tensor of the model, whose checkpoints have {_some(state)}")


def _checked(own: str, tensor: Any) -> Any:
    """A tensor of the model, if all of it is here."""
    if type(tensor) not in (nn.Parameter, Tensor) or tensor.is_meta or hasattr(tensor, "ds_id"):
        kind = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}"
        raise ValueError(f"{own} is {kind}: load_weights takes whole weights that are in place")
    return tensor


def _check_value(name: str, value: Any, place: Tensor) -> None:
    """ValueError unless `value` can be copied to `place`."""
    if type(value) not in (nn.Parameter, Tensor):
        raise ValueError(f"{name} is of type {type(value).__name__}: it must be a whole tensor")
    if value.is_meta:
        raise ValueError(f"{name} has no data, on the meta device: it must be a whole tensor")
    if value.layout != torch.strided:
        raise ValueError(f"{name} has layout {value.layout}: it must be {torch.strided}")
    if value.dtype not in DTYPES.values():
        allowed = tuple(DTYPES.values())
        raise ValueError(f"{name} has dtype {value.dtype}: it must be one of {allowed}")
    if value.shape != place.shape:
        raise ValueError(
            f"{name} has shape {list(value.shape)}, the model needs {list(place.shape)}"
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
