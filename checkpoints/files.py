"""Tensors in safetensors files, read straight to where they belong.

Transformers could convert experts while it loads, but would hold the mapped files, all experts and
their fused copies at once. `stored_tensors` reads every expert's bytes to their place in the fused
tensor instead, which needs no more memory than the model.
"""

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from kimi_linear.checkpoints.experts import FUSED, ExpertMatrix
from kimi_linear.checkpoints.names import own_name

HEADER_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredBlock:
    """Where one tensor's bytes are: `size` of them from byte `start` of file `path`."""

    path: str
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


def read_header(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name from a safetensors file's header, after checking that the file holds all its
    data.

    Raises:
        ValueError: If the file is missing, is no safetensors file to safetensors' own reader, or
            ends too early (naming the first tensor cut).
    """
    return {name: block.shape for name, block in read_blocks(path).items()}


def read_blocks(path: str) -> dict[str, StoredBlock]:
    """Where a file's tensors are; see `read_header`."""
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

    def get_dtype(self) -> str:
        """The dtype as safetensors names it, which Transformers' loader asks for."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

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
                    read_into(files[block.path], block, part)
                else:
                    staged = torch.empty(count, dtype=DTYPES[block.dtype], device="cpu")
                    read_into(files[block.path], block, staged)
                    part.copy_(staged)
                position += count
        return out[index]


def read_into(file: Any, block: StoredBlock, target: Tensor) -> None:
    """Fill `target`, which is flat, with the block's bytes.

    Raises:
        OSError: If the file has become shorter.
    """
    if block.size == 0:
        return
    # `numpy()` would forbid the memory to be freed before its last tensor is (`quantization/`)
    view = memoryview((ctypes.c_ubyte * block.size).from_address(target.data_ptr())).cast("B")
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
        blocks |= read_blocks(path)
    if any(block.dtype not in DTYPES for block in blocks.values()):
        return None
    return tensors_of(blocks, model)


def tensors_of(blocks: dict[str, StoredBlock], model: PreTrainedModel) -> dict[str, StoredTensor]:
    """As `stored_tensors`, of tensors that were found in files; takes experts out of `blocks`."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    fused = {
        name: ([blocks.pop(part) for part in parts], shape)
        for name, parts, shape in list(_fused_experts(blocks))
    }
    alone = {name: ([block], block.shape) for name, block in blocks.items()}
    tensors: dict[str, StoredTensor] = {}
    for name, (found, shape) in {**fused, **alone}.items():
        own = own_name(name, dtypes, model.base_model_prefix)
        dtype = dtypes[own] if own else DTYPES[found[0].dtype]
        tensors[name] = StoredTensor(found, shape, dtype)
    return tensors


def _fused_experts(
    blocks: dict[str, StoredBlock],
) -> Iterator[tuple[str, list[str], tuple[int, ...]]]:
    """Name, parts in order of memory, and shape of each fused tensor whose parts are all there."""
    layers: dict[str, set[int]] = {}  # the experts by prefix
    for matrix in map(ExpertMatrix.from_name, blocks):
        if matrix:
            layers.setdefault(matrix.prefix, set()).add(matrix.expert)
    for prefix, experts in layers.items():
        for fused, kinds in FUSED.items():
            matrices = [ExpertMatrix(prefix, e, k) for e in range(len(experts)) for k in kinds]
            parts = [matrix.name for matrix in matrices]
            shapes = {blocks[part].shape if part in blocks else None for part in parts}
            shape = shapes.pop()
            if not shapes and shape is not None and len(shape) == 2:
                yield prefix + fused, parts, (len(experts), shape[0] * len(kinds), shape[1])
