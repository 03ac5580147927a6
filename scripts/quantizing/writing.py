"""safetensors files that are written tensor by tensor, each at the place that its header says.

safetensors' own writer holds a whole file in memory. A file has another name until it is whole and
on the disk, so that one with its name and its size needs no further look after a kill.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from quantizing.plan import ITEM_SIZES, NAMES, num_bytes

UNFINISHED = ".unfinished"
METADATA = {"format": "pt"}  # Transformers wants to be told
ALIGNMENT = 8


class TensorFile:
    """One file, used as a context: it takes its name when that is left without an error.

    Args:
        path: The file.
        tensors: Names, shapes and safetensors' dtypes of all that it is to hold.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, tuple[int, ...], str]]) -> None:
        self.path, self.draft = path, path.with_name(path.name + UNFINISHED)
        # as safetensors orders them, so that each begins at a multiple of its numbers' size
        ordered = sorted(tensors, key=lambda each: (-ITEM_SIZES[each[2]], each[0]))
        entries: dict[str, Any] = {}
        self.places: dict[str, tuple[int, tuple[int, ...], str]] = {}
        end = 0
        for name, shape, dtype in ordered:
            start, end = end, end + num_bytes(shape, dtype)
            self.places[name] = start, shape, dtype
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps({"__metadata__": METADATA, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + end

    def is_finished(self) -> bool:
        """Whether the file is there, of the size and with the header that it is to have."""
        if not self.path.is_file() or self.path.stat().st_size != self.size:
            return False
        with open(self.path, "rb") as file:
            return file.read(len(self.header)) == self.header

    def __enter__(self) -> "TensorFile":
        self.left = set(self.places)
        self.file = open(self.draft, "wb", buffering=0)
        _write(self.file, memoryview(self.header))
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one of the tensors."""
        start, shape, dtype = self.places[name]
        found = tuple(tensor.shape), NAMES[tensor.dtype]
        assert found == (shape, dtype) and name in self.left, (name, found, shape, dtype)
        self.left.remove(name)
        numbers = tensor.detach().cpu().contiguous().view(-1)
        if numbers.numel():
            self.file.seek(len(self.header) + start)
            _write(self.file, numbers.view(torch.uint8).numpy().data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self.file:
            if kind is not None:
                return
            assert not self.left, f"not written: {sorted(self.left)[:3]}"
            self.file.truncate(self.size)  # where the last tensor is empty
            os.fsync(self.file.fileno())
        self.draft.rename(self.path)


def _write(file: Any, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += file.write(data[done:])
