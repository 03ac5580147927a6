"""A model with packed weights on its way to files: the state dict and the configuration's entry."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kimi_linear.checkpoints.packed import FP8, check_matrices, config_of, entries
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import Scheme
from kimi_linear.upstream.deferred import DeferredTensor


def entry_of_state(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry `quantization_config` that says how a state dict's weights are held.

    Args:
        state: By the model's names.

    Returns:
        None if none of them is packed.

    Raises:
        ValueError: If some cannot be written, see `packed_entries`.
    """
    if not any(isinstance(x, PackedWeights) for x in state.values()):
        return None
    schemes: dict[str, Scheme | None] = {}
    for name, x in state.items():
        stem, _, last = name.rpartition(".")
        scheme = None
        if isinstance(x, PackedWeights):
            check_matrices(name, x)
            scheme = x.scheme
        if stem.endswith("experts") and last != "weight":
            schemes[name] = scheme
        elif last == "weight" and x.dim() == 2:
            schemes[stem] = scheme
    return config_of(schemes)


def stored_state(state: dict[str, Any], tied: Mapping[str, str]) -> dict[str, Any]:
    """A state dict with the tensors of files in the place of packed weights, each made when it is
    written.

    Args:
        state: By the model's names.
        tied: The model's tied weights, and what they are tied to.
    """
    entry = entry_of_state(state)
    if entry is None:
        return state
    is_fp8, found = entry["quant_method"] == FP8, {}
    for name, x in state.items():
        if not isinstance(x, PackedWeights):
            found[name] = x
        elif tied.get(name) not in state:
            for each in entries(name, x, is_fp8=is_fp8):
                found[each.name] = _deferred(each)
    return found


def _deferred(entry: Any) -> Tensor:
    return DeferredTensor(entry.shape, entry.dtype, entry.make)
