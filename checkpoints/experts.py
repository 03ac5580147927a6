"""The experts' layout: where each expert's matrices of a checkpoint stand in the model's tensors.

A checkpoint stores w1 (gate), w3 (up) and w2 (down) of each expert by itself; the model holds
`gate_up_proj` [E, 2I, D] and `down_proj` [E, D, I]. `FUSED` says so once, for loading, saving,
resuming and checking. Everything else carries the checkpoint's name in the model too.

Four ways lead in: `from_pretrained` of safetensors files reads each matrix to its place
(`files.py`), and other files by the conversion that is registered here; `load_state_dict`, by which
Trainer resumes, by the hook here; `load_weights` by `live_weights.py`. One leads out: Transformers
turns the registered conversion around when it saves.

Shapes: D hidden size, I expert width, E experts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.layers.moe import KimiLinearExperts
from kimi_linear.upstream.interfaces import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    register_checkpoint_conversion_mapping,
)

# The kinds of matrices that stand one below the other in each expert of a fused tensor.
FUSED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
FUSED_IN = {kind: fused for fused, kinds in FUSED.items() for kind in kinds}
MATRIX_NAME = re.compile(r"(|(?:.*\.)?experts\.)(\d+)\.(w[123])\.weight")


@dataclass(frozen=True)
class ExpertMatrix:
    """One matrix of one expert, by the checkpoint's name."""

    prefix: str  # of the module of all experts, with its dot
    expert: int
    kind: str

    @classmethod
    def from_name(cls, name: str) -> "ExpertMatrix | None":
        """None for a name of another form."""
        match = MATRIX_NAME.fullmatch(name)
        return match and cls(match[1], int(match[2]), match[3])

    @property
    def name(self) -> str:
        """The checkpoint's name."""
        return f"{self.prefix}{self.expert}.{self.kind}.weight"

    @property
    def fused_name(self) -> str:
        """The name of the tensor that holds it in the model."""
        return self.prefix + FUSED_IN[self.kind]

    def place(self, fused: Tensor) -> Tensor:
        """Its part of that tensor, a view."""
        kinds = FUSED[FUSED_IN[self.kind]]
        return fused[self.expert].chunk(len(kinds))[kinds.index(self.kind)]


def split_names(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The checkpoint's names and shapes of one tensor of the model: many if it is a fused one."""
    prefix, _, last = name.rpartition("experts.")
    if last not in FUSED or (prefix and not prefix.endswith(".")):
        yield name, shape
        return
    kinds = FUSED[last]
    for expert in range(shape[0]):
        for kind in kinds:
            matrix = ExpertMatrix(f"{prefix}experts.", expert, kind)
            yield matrix.name, (shape[1] // len(kinds), shape[2])


def register_conversion(class_name: str) -> None:
    """Register the mapping for models of class `class_name`, a name Transformers has not.

    The patterns are regular expressions on load and, the other way round, on save: an unescaped dot
    would also match the underscore of `shared_experts.down_proj`.
    """
    converters = [
        WeightConverter(
            source_patterns=[rf"\.experts.*.{kind}.weight" for kind in kinds],
            target_patterns=rf"\.experts\.{fused}",
            operations=[MergeModulelist(dim=0), *[Concatenate(dim=1)] * (len(kinds) > 1)],
        )
        for fused, kinds in FUSED.items()
    ]
    register_checkpoint_conversion_mapping(class_name, converters, overwrite=True)


def take_matrices_in_state_dicts(model: nn.Module) -> None:
    """Let experts' `load_state_dict` take the checkpoint's names too: Trainer resumes by it, shard
    by shard."""
    for module in model.modules():
        if isinstance(module, KimiLinearExperts):
            module.register_load_state_dict_pre_hook(_fuse_matrices)


@torch.no_grad()
def _fuse_matrices(
    experts: Any,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Replace the matrices in `state_dict` by fused tensors, or put them into their places."""
    found = [ExpertMatrix.from_name(name) for name in state_dict if name.startswith(prefix)]
    arrived = [m for m in found if m and m.prefix == prefix and m.expert < experts.num_experts]
    is_complete = len(arrived) == experts.num_experts * len(FUSED_IN)
    if is_complete and local_metadata.get("assign_to_params_buffers"):
        # the parameters, which may be on the meta device, are not to be written to
        for fused, kinds in FUSED.items():
            state_dict[prefix + fused] = torch.stack(
                [
                    torch.cat([state_dict.pop(ExpertMatrix(prefix, e, k).name) for k in kinds])
                    for e in range(experts.num_experts)
                ]
            )
        return
    for matrix in arrived:
        place = matrix.place(getattr(experts, FUSED_IN[matrix.kind]))
        _copy(matrix.name, state_dict.pop(matrix.name), place, error_msgs)
    if is_complete:
        for fused in FUSED:
            state_dict.setdefault(prefix + fused, getattr(experts, fused).detach())


def _copy(name: str, value: Tensor, place: Tensor, error_msgs: list[str]) -> None:
    """Fill `place`, or tell torch why that cannot be."""
    if place.is_meta:
        error_msgs.append(
            f"{name} cannot be put into a model on the meta device alone: assign=True needs "
            "the matrices of all experts of a layer in one state_dict"
        )
    elif place.shape != value.shape:
        error_msgs.append(
            f"size mismatch for {name}: copying a param with shape {value.shape} from checkpoint, "
            f"the shape in current model is {place.shape}."
        )
    else:
        place.copy_(value)
