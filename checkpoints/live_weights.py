"""New weights for a model in use, by the checkpoint's names: `model.load_weights(pairs)`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kimi_linear.checkpoints.experts import FUSED_IN, ExpertMatrix, split_names
from kimi_linear.checkpoints.files import DTYPES
from kimi_linear.checkpoints.names import official_shapes, own_name, some
from kimi_linear.upstream.models import is_divided, is_quantized


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
            written |= dict.fromkeys(
                (part for part, _ in split_names(own, tuple(place.shape))), name
            )
        loaded.add(name)
    missing = [name for name in official_shapes(model) if name not in written] if strict else []
    if missing:
        raise ValueError(f"weights: {some(missing)} did not come, which strict=True demands")
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
    own = own_name(name, state, base_prefix)
    if own:
        return own, own, _checked(own, state[own])
    matrix = ExpertMatrix.from_name(name)
    own = own_name(matrix.fused_name, state, base_prefix) if matrix else None
    if matrix is None or own is None:
        raise ValueError(f"{name} is no tensor of the model, whose checkpoints have {some(state)}")
    experts = _checked(own, state[own])
    if matrix.expert >= len(experts):
        raise ValueError(f"{name} has no place: num_experts={len(experts)} in the model")
    official = replace(matrix, prefix=own.removesuffix(FUSED_IN[matrix.kind]))
    return own, official.name, matrix.place(experts)


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
