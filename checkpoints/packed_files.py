"""Packed weights read from safetensors files straight to their place.

What the model holds in one tensor is a `StoredPacked`, which is read when Transformers' loader asks
for it, on the device that it is meant for: some experts, or some rows, at a time, so that loading
takes the memory of the packed model and little more.

Shapes: M matrices, N outputs, K inputs, G groups of a row, R rows that share a scale, E experts.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kimi_linear.checkpoints.bits import from_words
from kimi_linear.checkpoints.checks import CheckpointError
from kimi_linear.checkpoints.experts import FUSED, ExpertMatrix
from kimi_linear.checkpoints.files import DTYPES, StoredBlock, read_blocks, tensors_of
from kimi_linear.checkpoints.packed import LINEAR_PARTS, part_of
from kimi_linear.checkpoints.packed_config import StoredSchemes
from kimi_linear.checkpoints.packed_parts import OpenFiles, StoredMatrix, stored_matrices
from kimi_linear.configuration_quantization import PARTS
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.ops.runtime import ceil_div
from kimi_linear.schemes import Scheme

# Codes that are read at once.
PIECE = 1 << 23


class StoredPacked:
    """A tensor of the model whose matrices are quantised in files.

    Transformers' loader takes it for a slice of a file: it asks for all of it, then for its device.
    """

    def __init__(
        self, matrices: list[StoredMatrix], shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.matrices, self.shape, self.dtype = matrices, shape, dtype
        rows = matrices[0].shape[0]
        self.num_kinds = shape[1] // rows if len(shape) == 3 else 1
        self.scheme = matrices[0].scheme
        if self.num_kinds > 1:  # blocks of rows that no two matrices share
            self.scheme = replace(self.scheme, rows=math.gcd(self.scheme.rows, rows))
        self.is_kept = part_of(matrices[0].stem) is not None

    def __getitem__(self, index: Any) -> "StoredPacked":
        return self

    def get_dtype(self) -> str:
        """Of what is stored: the loader would convert floats."""
        return "U8"

    def to(self, device: Any = None, dtype: Any = None) -> nn.Parameter:
        """The parameter on a device, in the model's own dtype."""
        dtype = self.dtype if self.is_kept else torch.float32
        outer = self.shape if len(self.shape) == 3 else (1, *self.shape)
        whole: Any = PackedWeights.empty(outer, self.scheme, dtype, device or "cpu")
        with OpenFiles() as files:
            for experts, rows in self._pieces(outer):
                chosen = slice(experts.start * self.num_kinds, experts.stop * self.num_kinds)
                piece = self._read(files, self.matrices[chosen], rows, whole.device, dtype)
                whole.fill((experts, rows), piece)
        whole = whole if len(self.shape) == 3 else whole[0]
        if self.is_kept:
            return nn.Parameter(whole, requires_grad=False)
        return nn.Parameter(whole.dequantized().to(self.dtype))  # computed with in 16 bits

    def _pieces(self, shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
        """Experts and rows that are read at once: some experts, or some rows of a matrix."""
        num_experts, num_rows, num_inputs = shape
        step = max(1, PIECE // (num_rows * num_inputs))
        shared = self.scheme.rows
        is_matrix = len(self.shape) == 2
        rows = max(1, PIECE // num_inputs // shared) * shared if is_matrix else num_rows
        for expert in range(0, num_experts, step):
            for row in range(0, num_rows, rows):
                experts = slice(expert, min(expert + step, num_experts))
                yield experts, slice(row, min(row + rows, num_rows))

    def _read(
        self,
        files: OpenFiles,
        matrices: list[StoredMatrix],
        rows: slice,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PackedWeights:
        """Rows of some of the matrices, [M / kinds, N kinds, K]. There are several matrices, or
        kinds, only with all of their rows."""
        scheme, (num_rows, num_inputs) = matrices[0].scheme, matrices[0].shape
        rows = rows if len(matrices) == 1 else slice(0, num_rows)

        def stacked(part: str, chosen: slice | None = None) -> Tensor:
            read = [files.read(matrix.parts[part], chosen) for matrix in matrices]
            return torch.stack(read).to(device)

        if scheme.is_float:
            codes = stacked("weight", rows).view(torch.uint8)
        else:
            words = stacked("weight_packed", rows)
            codes = from_words(words.flatten(0, 1), scheme.bits, num_inputs)
            codes = codes.unflatten(0, words.shape[:2])
        name = next(part for part in matrices[0].parts if part.startswith("weight_scale"))
        if matrices[0].group.is_per_tensor:
            scale = stacked(name).to(dtype).view(-1, 1, 1).expand(-1, codes.shape[1], 1)
        else:
            shared = slice(rows.start // scheme.rows, ceil_div(rows.stop, scheme.rows))
            scale = stacked(name, shared).to(dtype)
        if self.scheme.rows != scheme.rows:
            finer = scale.repeat_interleave(scheme.rows // self.scheme.rows, dim=1)
            scale = finer[:, : ceil_div(num_rows, self.scheme.rows)]
        zero = None
        if not scheme.is_symmetric:
            by_group = stacked("weight_zero_point").transpose(1, 2)  # [M, G, ceil(N bits / 32)]
            zeros = from_words(by_group.flatten(0, 1), scheme.bits, num_rows)
            zeros = zeros.unflatten(0, by_group.shape[:2]).transpose(1, 2)
            zero = self._joined(zeros[:, rows])
        joined = self._joined(codes), self._joined(scale)
        return PackedWeights.of_codes(*joined, zero, self.scheme, dtype)

    def _joined(self, by_matrix: Tensor) -> Tensor:
        """[M, N, ..] to [M / kinds, N kinds, ..]."""
        return by_matrix.unflatten(0, (-1, self.num_kinds)).flatten(1, 2)


class Unread:
    """A tensor that the model has no place for, of which the loader reports the name."""


def read_packed(
    files: Iterable[str], model: PreTrainedModel, schemes: StoredSchemes
) -> tuple[dict[str, Any], list[StoredMatrix]]:
    """The tensors of a checkpoint with quantised matrices, still in their files.

    Args:
        files: Paths of all shards, safetensors.
        model: The model to load, possibly on the meta device; says the dtypes to read into.
        schemes: What the checkpoint's configuration says.

    Returns:
        Tensors by name, for use as a state dict, and the quantised matrices.

    Raises:
        CheckpointError: As `stored_matrices`, and if experts of a layer are not all held alike.
        ValueError: As `read_blocks`.
    """
    blocks: dict[str, StoredBlock] = {}
    for path in files:
        blocks |= read_blocks(path)
    matrices = stored_matrices(blocks, model, schemes)
    taken = {name for matrix in matrices for name in matrix.names()}
    plain = {name: block for name, block in blocks.items() if name not in taken}
    unknown = {name: Unread() for name, block in plain.items() if block.dtype not in DTYPES}
    plain = {name: block for name, block in plain.items() if name not in unknown}
    tensors: dict[str, Any] = {**tensors_of(dict(plain), model), **unknown}
    tensors |= _by_tensor(matrices, plain, dict(model.state_dict()))
    return tensors, matrices


def _by_tensor(
    matrices: list[StoredMatrix], plain: Mapping[str, StoredBlock], state: Mapping[str, Tensor]
) -> dict[str, StoredPacked]:
    owners: dict[str, dict[str, StoredMatrix]] = {}
    for matrix in matrices:
        owners.setdefault(matrix.own, {})[matrix.stem] = matrix
    found = {}
    for own, mine in owners.items():
        shape = tuple(state[own].shape)
        ordered = _ordered(own, mine, shape, plain) if len(shape) == 3 else list(mine.values())
        found[own] = StoredPacked(ordered, shape, state[own].dtype)
    return found


def _ordered(
    own: str,
    mine: dict[str, StoredMatrix],
    shape: tuple[int, ...],
    plain: Mapping[str, StoredBlock],
) -> list[StoredMatrix]:
    """The matrices of a fused tensor as they stand in it, all of which must be there."""
    first = next(iter(mine.values()))
    named = ExpertMatrix.from_name(f"{first.stem}.weight")
    assert named is not None
    kinds = FUSED[own.rpartition(".")[2]]
    ordered = []
    for expert in range(shape[0]):
        for kind in kinds:
            stem = ExpertMatrix(named.prefix, expert, kind).name.removesuffix(".weight")
            matrix = mine.get(stem)
            if matrix is None:
                state = "in 16 bits" if f"{stem}.weight" in plain else "missing"
                raise CheckpointError(
                    f"{first.path}: {stem} is {state}, and {first.stem} is quantised: all experts "
                    "of a layer must be held alike"
                )
            if matrix.group != first.group:
                raise CheckpointError(
                    f"{matrix.path}: {stem} is in {_words(matrix.scheme)}, and {first.stem} in "
                    f"{_words(first.scheme)}: all experts of a layer must be held alike"
                )
            ordered.append(matrix)
    return ordered


def element_size(schemes: StoredSchemes, name: str, parameter: Tensor) -> float:
    """Bytes that a number takes of a parameter, by its name in the model."""
    stem, is_experts = name.removesuffix(".weight"), parameter.dim() == 3 and "experts." in name
    if is_experts:
        kind = FUSED[name.rpartition(".")[2]][0]
        stem = f"{name.rpartition('.')[0]}.0.{kind}"
    group = schemes.group_of(stem) if is_experts or name.endswith(".weight") else None
    parts = LINEAR_PARTS if schemes.is_fp8 else PARTS
    if group is None or part_of(stem) not in parts or parameter.dim() < 2:
        return parameter.element_size()
    return group.scheme.bits_per_weight(8 * parameter.element_size()) / 8


def _words(scheme: Scheme) -> str:
    return f"{scheme.bits} bits, group={scheme.group}, is_float={scheme.is_float}"
