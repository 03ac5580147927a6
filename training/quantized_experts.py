"""Quantises the routed experts while a checkpoint is read: adapters over a frozen base (QLoRA).

Transformers' bitsandbytes integration quantises linear layers. The routed experts, nearly all of
the parameters, are fused tensors that it leaves as they are; here they are quantised when they
arrive from the checkpoint, one at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kimi_linear.ops.experts.quantized import QuantizedExperts, bitsandbytes
from kimi_linear.ops.quantized import plain_weights
from kimi_linear.upstream.models import mark_initialized

EXPERT_TENSORS = ("gate_up_proj", "down_proj")


def has_quantized_experts(model: nn.Module) -> bool:
    """Whether some of the model's experts are quantised."""
    return any(isinstance(parameter, QuantizedExperts) for parameter in model.parameters())


def saved_bytes(model: nn.Module) -> int:
    """How many bytes fewer the model's experts take than their numbers and dtypes say."""
    quantized = [each for each in model.parameters() if isinstance(each, QuantizedExperts)]
    return sum(each.numel() * each.element_size() - each.held_bytes() for each in quantized)


def dequantize_experts(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put plain trainable parameters in the place of quantised experts, one at a time.

    Args:
        model: Any module.
        dtype: Of the parameters; None: what computations see now.
    """
    for module in model.modules():
        for name, weights in list(module.named_parameters(recurse=False)):
            if isinstance(weights, QuantizedExperts):
                setattr(module, name, nn.Parameter(plain_weights(weights, dtype)))


@contextmanager
def quantizing_experts(
    model: nn.Module, kind: type, config: Any, is_quantized_file: bool
) -> Iterator[None]:
    """While a checkpoint is read, quantise what arrives in the model's experts.

    Args:
        model: The model, on the meta device.
        kind: The experts' class.
        config: The quantisation's, or None; only bitsandbytes' counts.
        is_quantized_file: Whether the checkpoint's weights are quantised already.

    Raises:
        ValueError: For a checkpoint that is quantised already.
    """
    method = getattr(config, "quant_method", None)
    if getattr(method, "value", method) != "bitsandbytes":
        yield
        return
    if is_quantized_file:
        raise ValueError(
            "quantization_config in the checkpoint is not allowed: bitsandbytes' layout has no "
            "place for fused experts; load the released weights, and quantise them while loading"
        )
    skipped = config.llm_int8_skip_modules or []
    experts = [
        module
        for name, module in model.named_modules()
        if isinstance(module, kind) and not any(skip in name for skip in skipped)
    ]
    if config.load_in_4bit:
        _keep_linears_exact(model)

    class Arriving(kind):  # type: ignore[misc, valid-type]
        """Experts that quantise what is put into them."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name in EXPERT_TENSORS and not value.is_meta:
                value = _quantized(value, config)
            super().__setattr__(name, value)

    for module in experts:
        module.__class__ = Arriving
    try:
        yield
    finally:
        for module in experts:
            module.__class__ = kind


def _keep_linears_exact(model: nn.Module) -> None:
    """Have linear layers in 4 bits compute the same on every CPU, whatever their size.

    On a CPU with AVX512-BF16, the first evaluation repacks a layer's weights for a kernel that
    refuses sizes, computes in bfloat16 whatever was asked for, and has no gradient: training after
    it goes wrong too. On a CPU with AVX512, weights whose rows are not whole blocks come back with
    scales of other blocks: such layers stay wide, on every device.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, bitsandbytes().nn.Linear4bit):
            continue
        module.support_avx512bf16_for_cpu = False
        if module.in_features % module.weight.blocksize:
            sizes, has_bias = (module.in_features, module.out_features), module.bias is not None
            plain = nn.Linear(*sizes, has_bias, device="meta", dtype=module.weight.dtype)
            model.set_submodule(name, plain)


def _quantized(weights: Tensor, config: Any) -> nn.Parameter:
    if config.load_in_4bit:
        kind, is_double = config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant
        quantized = QuantizedExperts.of(weights, 4, kind, is_double)
    else:
        quantized = QuantizedExperts.of(weights, 8)
    made = nn.Parameter(quantized, requires_grad=False)
    mark_initialized(made)
    return made
