"""Models whose weights are packed."""

from typing import Any

import torch
from torch import nn

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from kimi_linear.ops.packed.rounding import quantize
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import Scheme


def packed_weights(model: nn.Module, quantization: KimiLinearQuantizationConfig) -> Any:
    """Module, name and scheme of each weight that a configuration packs."""
    for name, module in model.named_modules():
        scheme = quantization.scheme_of(name)
        for own, parameter in list(module.named_parameters(recurse=False)):
            if scheme is not None:
                yield module, own, parameter, scheme


def pack_model(model: KimiLinearForCausalLM, quantization: KimiLinearQuantizationConfig) -> None:
    """Quantise a model in place."""
    for module, name, parameter, scheme in packed_weights(model, quantization):
        packed = quantize(parameter.data, scheme, name)
        setattr(module, name, nn.Parameter(packed, requires_grad=False))


def fill_with_packed(
    model: KimiLinearForCausalLM, quantization: KimiLinearQuantizationConfig, device: str
) -> None:
    """Packed weights that are not set, in the place of all that a configuration packs."""
    for module, name, parameter, scheme in packed_weights(model, quantization):
        empty = PackedWeights.empty(tuple(parameter.shape), scheme, torch.bfloat16, device)
        setattr(module, name, nn.Parameter(empty, requires_grad=False))


def every_part(experts: Scheme, others: Scheme | None = None) -> KimiLinearQuantizationConfig:
    """A configuration that packs the experts in one way and all else in another."""
    rest = ("shared_experts", "attention", "embeddings", "head")
    return KimiLinearQuantizationConfig(experts=experts, **dict.fromkeys(rest, others))
