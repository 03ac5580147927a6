"""The tensors of quantised matrices in a checkpoint: found, and checked against the model.

`packed.py` has the table of what stands for a matrix NAME.

Shapes: N outputs, K inputs, G groups of a row, R rows that share a scale.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kimi_linear.checkpoints.bits import num_words
from kimi_linear.checkpoints.checks import CheckpointError, check_expert
from kimi_linear.checkpoints.experts import FUSED, FUSED_IN, ExpertMatrix
from kimi_linear.checkpoints.files import DTYPES, StoredBlock, read_into
from kimi_linear.checkpoints.names import own_name
from kimi_linear.checkpoints.packed_config import Group, StoredSchemes
from kimi_linear.ops.runtime import ceil_div
from kimi_linear.schemes import Scheme

FLOAT8, SCALES = "F8_E4M3", ("BF16", "F16", "F32")
KINDS = {**DTYPES, "I32": torch.int32, "I64": torch.int64, FLOAT8: torch.float8_e4m3fn}
ORDER = "weight_g_idx"  # the group of each input
PARTS = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point"),
    ORDER,
)
# Other tensors that stand beside a matrix's, which say what is not done here.
NOT_READ = (
    *("input_scale", "input_zero_point", "input_global_scale", "weight_global_scale", "g_idx"),
    *("output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale", "qweight", "qzeros"),
    *("scales", "weight_bitmask"),
)


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix in its files.

    Attributes:
        stem: Its name in the checkpoint, without ".weight".
        own: The name of the model's tensor that has it.
        shape: (N, K).
        group: How it is held.
        parts: Its tensors, by the end of their names.
    """

    stem: str
    own: str
    shape: tuple[int, int]
    group: Group
    parts: dict[str, StoredBlock]

    @property
    def scheme(self) -> Scheme:
        return self.group.scheme

    @property
    def path(self) -> str:
        """A file that has some of it, for messages."""
        return next(iter(self.parts.values())).path

    def names(self) -> Iterator[str]:
        """Of its tensors."""
        return (f"{self.stem}.{part}" for part in self.parts)


class OpenFiles(ExitStack):
    """Reads tensors, and keeps files open for the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[str, Any] = {}

    def read(self, block: StoredBlock, rows: slice | None = None) -> Tensor:
        """A tensor as it is stored, or some of its rows, on the CPU."""
        if rows is not None:
            size = block.size // block.shape[0]
            block = StoredBlock(
                block.path,
                block.start + rows.start * size,
                (rows.stop - rows.start) * size,
                block.dtype,
                (rows.stop - rows.start, *block.shape[1:]),
            )
        if block.path not in self._files:
            file = open(block.path, "rb", buffering=0)  # noqa: SIM115
            self._files[block.path] = self.enter_context(file)
        out = torch.empty(torch.Size(block.shape).numel(), dtype=KINDS[block.dtype], device="cpu")
        read_into(self._files[block.path], block, out)
        return out.view(block.shape)


def stored_matrices(
    blocks: Mapping[str, StoredBlock], model: Any, schemes: StoredSchemes
) -> list[StoredMatrix]:
    """Find the quantised matrices of a checkpoint that the model has.

    Args:
        blocks: All of its tensors, by name.
        model: The model that it is for, possibly on the meta device.
        schemes: What its configuration says.

    Raises:
        CheckpointError: A tensor of a matrix is missing, has another shape or dtype, is not read,
            or says something else than the configuration; the message names it.
    """
    found: dict[str, dict[str, StoredBlock]] = {}
    for name, block in blocks.items():
        stem, _, part = name.rpartition(".")
        if part in NOT_READ:
            raise CheckpointError(
                f"{block.path}: tensor {name} is not allowed: of quantised matrices weight, "
                f"{', '.join(PARTS)} are read"
            )
        if part in PARTS or (part == "weight" and block.dtype not in DTYPES):
            found.setdefault(stem, {})[part] = block
    state = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    prefix = model.base_model_prefix
    _check_plain(blocks, found, state, prefix, schemes)
    with OpenFiles() as files:
        rest = (blocks, state, prefix, schemes, files)
        matrices = [_matrix(stem, parts, *rest) for stem, parts in found.items()]
    return [matrix for matrix in matrices if matrix is not None]


def place_of(
    name: str, state: Mapping[str, tuple[int, ...]], base_prefix: str
) -> tuple[str, tuple[int, ...]] | None:
    """The model's tensor that has a matrix of the checkpoint, and the matrix' shape there."""
    own = own_name(name, dict(state), base_prefix)
    if own:
        return own, state[own]
    matrix = ExpertMatrix.from_name(name)
    own = own_name(matrix.fused_name, dict(state), base_prefix) if matrix else None
    if matrix is None or own is None or matrix.expert >= state[own][0]:
        return None
    _, rows, num_inputs = state[own]
    return own, (rows // len(FUSED[FUSED_IN[matrix.kind]]), num_inputs)


def _check_plain(
    blocks: Mapping[str, StoredBlock],
    found: Mapping[str, Any],
    state: Mapping[str, tuple[int, ...]],
    prefix: str,
    schemes: StoredSchemes,
) -> None:
    """A matrix that the configuration calls quantised is."""
    for name, block in blocks.items():
        stem, _, part = name.rpartition(".")
        if part != "weight" or len(block.shape) != 2 or stem in found or schemes.is_fp8:
            continue
        group = schemes.group_of(stem)
        if group is not None and place_of(name, state, prefix):
            raise CheckpointError(
                f"{block.path}: tensor {name} is in {block.dtype}, where quantization_config."
                f"config_groups.{group.name} says {_said(group.scheme)}: it must be so, or named "
                "in ignore"
            )


def _said(scheme: Scheme) -> str:
    return "float8" if scheme.is_float else f"{scheme.bits} bits"


def _matrix(
    stem: str,
    parts: dict[str, StoredBlock],
    blocks: Mapping[str, StoredBlock],
    state: Mapping[str, tuple[int, ...]],
    prefix: str,
    schemes: StoredSchemes,
    files: OpenFiles,
) -> StoredMatrix | None:
    """None for a matrix of a module that the model has not."""
    some, path = next(iter(parts)), next(iter(parts.values())).path
    place, group = place_of(f"{stem}.weight", state, prefix), schemes.group_of(stem)
    if place is None:
        check_expert(path, f"{stem}.weight", dict(state), prefix)
        return None
    if len(place[1]) != 2:
        raise CheckpointError(f"{path}: tensor {stem}.{some} is of no matrix of the model")
    if group is None:
        raise CheckpointError(
            f"{path}: tensor {stem}.{some} is of a quantised matrix, which no group of "
            "quantization_config.config_groups has among its targets: one must"
        )
    own, (rows, num_inputs) = place
    matrix = StoredMatrix(stem, own, (rows, num_inputs), group, parts)
    try:
        group.scheme.check_size(f"{stem}.weight", num_inputs)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    _check_parts(matrix, schemes, blocks.get(f"{stem}.weight"))
    _check_contents(matrix, files)
    return matrix


def _check_parts(matrix: StoredMatrix, schemes: StoredSchemes, weight: StoredBlock | None) -> None:
    """All parts are there, and no others, in their dtypes and shapes."""
    needed = _needed(matrix, schemes)
    allowed = {*needed, ORDER} if not matrix.scheme.is_float else set(needed)
    wide = {} if weight is None else {"weight": weight}
    for part, block in (matrix.parts | wide).items():
        if part not in allowed:
            raise CheckpointError(
                f"{block.path}: tensor {matrix.stem}.{part} is not allowed: {_said(matrix.scheme)} "
                f"have {', '.join(sorted(allowed))}"
            )
    if matrix.group.is_reordered:
        needed[ORDER] = (("I32",), ((matrix.shape[1],),))
    for part, (dtypes, shapes) in needed.items():
        name = f"{matrix.stem}.{part}"
        if part not in matrix.parts:
            raise CheckpointError(f"{matrix.path}: tensor {name} is missing")
        block = matrix.parts[part]
        if block.dtype not in dtypes:
            raise CheckpointError(
                f"{block.path}: tensor {name} is in {block.dtype}, it must be in "
                f"{' or '.join(dtypes)}"
            )
        if block.shape not in shapes:
            raise CheckpointError(
                f"{block.path}: tensor {name} has shape {list(block.shape)}, for a matrix "
                f"{list(matrix.shape)} in {_said(matrix.scheme)} it must be {list(shapes[0])}"
            )


def _needed(
    matrix: StoredMatrix, schemes: StoredSchemes
) -> dict[str, tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]]:
    """Dtypes and shapes, the usual one first, by part."""
    (rows, num_inputs), scheme = matrix.shape, matrix.scheme
    scales = ((ceil_div(rows, scheme.rows), scheme.num_groups(num_inputs)),)
    if matrix.group.is_per_tensor:
        scales = ((1,), (), (1, 1))  # type: ignore[assignment]
    if scheme.is_float:
        name = "weight_scale_inv" if schemes.is_fp8 else "weight_scale"
        return {"weight": ((FLOAT8,), (matrix.shape,)), name: (SCALES, scales)}
    words = (rows, num_words(num_inputs, scheme.bits))
    needed: dict[str, Any] = {
        "weight_packed": (("I32",), (words,)),
        "weight_scale": (SCALES, scales),
        "weight_shape": (("I64",), ((2,),)),
    }
    if not scheme.is_symmetric:
        zeros = (num_words(rows, scheme.bits), scheme.num_groups(num_inputs))
        needed["weight_zero_point"] = (("I32",), (zeros,))
    return needed


def _check_contents(matrix: StoredMatrix, files: OpenFiles) -> None:
    """What tensors say about others' sizes and order."""
    shape, order = matrix.parts.get("weight_shape"), matrix.parts.get(ORDER)
    if shape is not None:
        said = files.read(shape).tolist()
        if said != list(matrix.shape):
            raise CheckpointError(
                f"{shape.path}: tensor {matrix.stem}.weight_shape says {said}, the model needs "
                f"{list(matrix.shape)}"
            )
    if order is not None:
        inputs = torch.arange(matrix.shape[1])
        groups = inputs // (matrix.scheme.group or matrix.shape[1])
        name, is_whole = f"{matrix.stem}.{ORDER}", order.shape == (matrix.shape[1],)
        if not is_whole or order.dtype != "I32" or not torch.equal(files.read(order), groups.int()):
            raise CheckpointError(
                f"{order.path}: tensor {name} reorders the inputs, which is not read: each "
                "group must be inputs that follow each other (actorder 'weight' or null)"
            )
