"""Models whose weights are packed."""

import torch
from torch import nn

from kimi_linear import KimiLinearForCausalLM, KimiLinearQuantizationConfig
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.quantization.packing import packed_places
from kimi_linear.schemes import Scheme


def fill_with_packed(
    model: KimiLinearForCausalLM, quantization: KimiLinearQuantizationConfig, device: str
) -> None:
    """Packed weights that are not set, in the place of all that a configuration packs."""
    for place in list(packed_places(model, quantization)):
        shape = tuple(place.weights.shape)
        empty = PackedWeights.empty(shape, place.scheme, torch.bfloat16, device)
        setattr(place.module, place.attribute, nn.Parameter(empty, requires_grad=False))


def every_part(experts: Scheme, others: Scheme | None = None) -> KimiLinearQuantizationConfig:
    """A configuration that packs the experts in one way and all else in another."""
    rest = ("shared_experts", "attention", "embeddings", "head")
    return KimiLinearQuantizationConfig(experts=experts, **dict.fromkeys(rest, others))
