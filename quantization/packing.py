"""Which of a model's parameters are held in few bits, and how they come to be.

The modules stay what they are: an `nn.Linear` whose weight is a `PackedWeights` computes with it as
with any other. Tied embeddings share one packed tensor.

Shapes: N outputs, K inputs, E experts.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from kimi_linear.configuration_quantization import QUANT_METHOD, KimiLinearQuantizationConfig
from kimi_linear.layers.moe import KimiLinearExperts
from kimi_linear.ops.packed.rounding import quantize
from kimi_linear.ops.quantized import QuantizedTensor, plain_weights
from kimi_linear.quantization.arrivals import replacing_arrivals
from kimi_linear.schemes import Scheme
from kimi_linear.upstream.models import has_own_adapters, is_divided
from kimi_linear.upstream.quantizers import make_quantized, quantization_name

EXPERT_TENSORS = ("gate_up_proj", "down_proj")


class Place(NamedTuple):
    """A parameter that is to be held in few bits.

    Attributes:
        name: Its name in the model.
        module: The module that has it.
        attribute: Its name there.
        scheme: How it is held.
    """

    name: str
    module: nn.Module
    attribute: str
    scheme: Scheme

    @property
    def weights(self) -> Tensor:
        """[N, K], or of experts [E, N, K]: what is there now."""
        return getattr(self.module, self.attribute)


def packed_places(model: nn.Module, config: KimiLinearQuantizationConfig) -> Iterator[Place]:
    """The parameters that a configuration names, in the order of the modules.

    Raises:
        ValueError: If a module is of a kind that cannot be held in few bits.
    """
    for name, module in model.named_modules():
        scheme = config.scheme_of(name)
        if scheme is None or next(module.parameters(), None) is None:  # another process' stage
            continue
        is_experts = isinstance(module, KimiLinearExperts)
        if not is_experts and not isinstance(module, nn.Linear | nn.Embedding):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which cannot be quantised: it must be a "
                "plain layer; quantise the model before adapters are put on it"
            )
        for attribute in EXPERT_TENSORS if is_experts else ("weight",):
            yield Place(f"{name}.{attribute}", module, attribute, scheme)


def check_places(model: Any, config: KimiLinearQuantizationConfig) -> None:
    """Whether the model can be held as a configuration says; nothing is read or changed.

    Raises:
        ValueError: For a size that groups do not divide, naming the tensor, and for tied embeddings
            whose two parts are to be held differently.
    """
    for place in packed_places(model, config):
        place.scheme.check_size(place.name, place.weights.shape[-1])
    embeddings, head = config.schemes["embeddings"], config.schemes["head"]
    is_tied = model.config.tie_word_embeddings and model.get_output_embeddings() is not None
    if is_tied and head != embeddings:
        raise ValueError(
            f"head={head} is not allowed with tie_word_embeddings=True: it must be that of "
            f"embeddings, {embeddings}"
        )


def packing_arrivals(model: nn.Module, config: Any, *, frees: bool) -> AbstractContextManager[None]:
    """While a checkpoint is read, pack what arrives; nothing if `config` is None or another kind's.

    Args:
        model: The model, on the meta device.
        config: The quantisation's configuration.
        frees: See `replacing_arrivals`.
    """
    if quantization_name(config) != QUANT_METHOD:
        return nullcontext()
    places: dict[nn.Module, dict[str, Any]] = {}
    for place in packed_places(model, config):
        places.setdefault(place.module, {})[place.attribute] = partial(_arrived, place)
    return replacing_arrivals(places, frees=frees)


def _arrived(place: Place, weights: Tensor) -> nn.Parameter:
    if weights.shape != place.weights.shape:  # 5.17 does not look at shapes of quantised models
        raise ValueError(
            f"{place.name} has shape {list(weights.shape)}, the model needs "
            f"{list(place.weights.shape)}"
        )
    return _packed(place, weights)


def _packed(place: Place, weights: Tensor) -> nn.Parameter:
    made = quantize(weights.detach(), place.scheme, place.name)
    return nn.Parameter(made, requires_grad=False)


def pack_rest(model: nn.Module, config: KimiLinearQuantizationConfig) -> None:
    """Pack what a configuration names and is not packed yet, one after another, on its device."""
    packed: dict[int, nn.Parameter] = {}  # by the tensor before: tied modules share one
    places = [p for p in packed_places(model, config) if not isinstance(p.weights, QuantizedTensor)]
    # nothing if `from_pretrained` has read all of them
    for place in logging.tqdm(places, desc="Quantising weights", disable=not places):
        weights = place.weights
        if id(weights) not in packed:
            packed[id(weights)] = _packed(place, weights)
        setattr(place.module, place.attribute, packed[id(weights)])


def quantize_model(model: Any, quantization_config: KimiLinearQuantizationConfig) -> Any:
    """Hold the weights of a model in memory in few bits, in place.

    As `from_pretrained(folder, quantization_config=...)` does while it loads: packed weights are
    frozen, and are packed where they are, one after another.

    Args:
        model: A model of this package, whole and on its devices.
        quantization_config: Which part is held how.

    Returns:
        The model.

    Raises:
        ValueError: For a model that is quantised already, divided among processes, offloaded or
            under adapters; a size that groups do not divide; and weights that are not finite. The
            model is unchanged then.
    """
    _check_model(model, quantization_config)
    check_places(model, quantization_config)
    for place in packed_places(model, quantization_config):
        _check_weights(place)
    make_quantized(model, quantization_config)
    return model


def _check_model(model: Any, config: Any) -> None:
    if quantization_name(config) != QUANT_METHOD:
        raise ValueError(
            f"quantization_config={config!r} is not allowed: it must be a "
            "KimiLinearQuantizationConfig"
        )
    before = quantization_name(getattr(model.config, "quantization_config", None))
    if before is not None:
        raise ValueError(
            f"quantization_config of {QUANT_METHOD!r} is not allowed: the model is quantised "
            f"already, by {before!r}; dequantize() makes it wide"
        )
    if is_divided(model) or has_own_adapters(model):
        what = "is divided among processes" if is_divided(model) else "has adapters"
        raise ValueError(f"the model {what}, and cannot be quantised: it must be whole and plain")


def _check_weights(place: Place) -> None:
    weights = place.weights
    if type(weights) not in (nn.Parameter, Tensor) or weights.is_meta:
        kind = "on the meta device" if weights.is_meta else f"a {type(weights).__name__}"
        raise ValueError(f"{place.name} is {kind}, and cannot be quantised: it must be in place")
    matrices = weights if weights.dim() > 2 else [weights]
    if not all(bool(torch.isfinite(matrix).all()) for matrix in matrices):
        raise ValueError(f"{place.name} has numbers that are not finite, and cannot be quantised")


def saved_bytes(model: nn.Module) -> int:
    """How many bytes fewer the parameters take than their numbers and dtypes say."""
    quantized = [each for each in model.parameters() if isinstance(each, QuantizedTensor)]
    return sum(each.numel() * each.element_size() - each.held_bytes() for each in quantized)


def dequantize_parameters(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put plain trainable parameters in the place of quantised tensors, one at a time.

    Args:
        model: Any module.
        dtype: Of the parameters; None: what computations see now.
    """
    made: dict[int, nn.Parameter] = {}  # by the tensor before: tied modules share one
    for module in model.modules():
        for name, weights in list(module.named_parameters(recurse=False)):
            if not isinstance(weights, QuantizedTensor):
                continue
            if id(weights) not in made:
                made[id(weights)] = nn.Parameter(plain_weights(weights, dtype))
            setattr(module, name, made[id(weights)])
